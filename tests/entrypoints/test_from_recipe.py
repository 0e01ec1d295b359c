"""Every field of a pruning or quantization modifier reaches its method."""

import inspect

import pytest

from mopcompress.algorithms import METHODS
from mopcompress.entrypoints.from_recipe import method_config
from mopcompress.recipe.field_types import Spec
from mopcompress.recipe.recipe import DEFAULTS

OTHER_VALUES = {  # another valid value of every field that decides a result
    "sparsity": 0.25,
    "final_sparsity": 0.25,
    "mask_structure": "2:4",
    "targets": ("re:.*mlp",),
    "ignore": ("re:.*q_proj",),
    "block_size": 64,
    "dampening_frac": 0.1,
    "preserve_sparsity_mask": True,
    "iterations": 7,
    "refit_steps": 3,
    "match_dense": 0.5,
    "match_samples": 0.25,
    "config_groups": {"group_0": {"weights": {"num_bits": 3, "group_size": 32}}},
    "actorder": None,
}
TOGETHER = {"sparsity": {"actorder": None}, "mask_structure": {"actorder": None, "sparsity": 0.5}}  # for GPTQ
MASKING = [method for method in DEFAULTS if method != "structured"]  # see test_compress_structured
BY_THE_MODEL = {"apply_globally", "allocation", "owl_m", "allocation_spread"}  # see `allocate_sparsity`


@pytest.mark.parametrize("method", MASKING)
def test_no_field_of_a_modifier_is_ignored(method: str) -> None:
    modifier = DEFAULTS[method]
    names = {name for name, field in type(modifier).model_fields.items() if not field.exclude}
    for name in names - BY_THE_MODEL:
        required = TOGETHER.get(name, {}) if method == "gptq" else {}
        changed = type(modifier).model_validate(modifier.model_dump() | required | {name: OTHER_VALUES[name]})
        default = {name: getattr(modifier, name)} if name != "mask_structure" else {name: "0:0"}
        unchanged = type(modifier).model_validate(modifier.model_dump() | required | default)
        assert method_config(changed) != method_config(unchanged), name


@pytest.mark.parametrize("method", MASKING)
def test_options_are_the_keywords_of_the_function(method: str) -> None:
    modifier: Spec = DEFAULTS[method]
    parameters = inspect.signature(METHODS[method].solve).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY} - {"row_groups"}
    options = method_config(modifier).options
    assert keywords >= options.keys()
    assert keywords - options.keys() <= {"refit_steps"}
