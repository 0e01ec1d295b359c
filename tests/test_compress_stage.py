"""From a modifier to the words of its method's function."""

import inspect

import pytest

from mopcompress.compress import METHODS
from mopcompress.recipe.fields import Spec
from mopcompress.recipe.grammar import DEFAULTS
from mopcompress.stages.compress import compression_of

OTHER = {  # another valid value of every field that decides a result
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
    "config_groups": {"group_0": {"weights": {"num_bits": 3, "group_size": 32}}},
    "actorder": None,
}
TOGETHER = {"sparsity": {"actorder": None}, "mask_structure": {"actorder": None, "sparsity": 0.5}}  # for GPTQ
BY_THE_MODEL = {"apply_globally"}  # its shares come from the weights: `with_shares`


@pytest.mark.parametrize("method", DEFAULTS)
def test_no_field_that_decides_a_result_is_ignored(method: str) -> None:
    modifier = DEFAULTS[method]
    kept = {name for name, field in type(modifier).model_fields.items() if not field.exclude}
    for name in kept - BY_THE_MODEL:
        beside = TOGETHER.get(name, {}) if method == "gptq" else {}
        other = type(modifier).model_validate(modifier.model_dump() | beside | {name: OTHER[name]})
        without = {name: getattr(modifier, name)} if name != "mask_structure" else {name: "0:0"}
        before = type(modifier).model_validate(modifier.model_dump() | beside | without)
        assert compression_of(other) != compression_of(before), name


@pytest.mark.parametrize("method", DEFAULTS)
def test_the_options_are_the_keywords_of_the_function(method: str) -> None:
    modifier: Spec = DEFAULTS[method]
    keywords = inspect.signature(METHODS[method].solve).parameters.values()
    own = {one.name for one in keywords if one.kind is one.KEYWORD_ONLY} - {"row_groups"}
    options = compression_of(modifier).options
    assert own >= options.keys()
    assert own - options.keys() <= {"refit_steps"}
