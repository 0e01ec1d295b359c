"""From a modifier to the words of its method's function."""

import inspect

import pytest
from tiny_models import random_tokens, tiny_model

from mopcompress.algorithms import METHODS
from mopcompress.compress.layer_profile import allocation_errors, profile_layers
from mopcompress.compress.sequential import compress_model, plan_methods
from mopcompress.entrypoints.allocate_sparsity import ALLOCATIONS, allocate_sparsity
from mopcompress.entrypoints.from_recipe import method_config
from mopcompress.errors import DataError
from mopcompress.models.language_model import LanguageModel
from mopcompress.recipe import ALPSModifier, SparseGPTModifier
from mopcompress.recipe.field_types import Spec
from mopcompress.recipe.pruning_modifiers import Pruning
from mopcompress.recipe.recipe import DEFAULTS

TOKENS = random_tokens(6, 20)
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
    "match_samples": 0.25,
    "config_groups": {"group_0": {"weights": {"num_bits": 3, "group_size": 32}}},
    "actorder": None,
}
TOGETHER = {"sparsity": {"actorder": None}, "mask_structure": {"actorder": None, "sparsity": 0.5}}  # for GPTQ
MASKING = [method for method in DEFAULTS if method != "structured"]  # see test_narrow_stage
BY_THE_MODEL = {"apply_globally", "allocation", "owl_m", "allocation_spread"}  # see `allocate_sparsity`


@pytest.mark.parametrize("method", MASKING)
def test_no_field_that_decides_a_result_is_ignored(method: str) -> None:
    modifier = DEFAULTS[method]
    kept = {name for name, field in type(modifier).model_fields.items() if not field.exclude}
    for name in kept - BY_THE_MODEL:
        beside = TOGETHER.get(name, {}) if method == "gptq" else {}
        other = type(modifier).model_validate(modifier.model_dump() | beside | {name: OTHER[name]})
        without = {name: getattr(modifier, name)} if name != "mask_structure" else {name: "0:0"}
        before = type(modifier).model_validate(modifier.model_dump() | beside | without)
        assert method_config(other) != method_config(before), name


@pytest.mark.parametrize("method", MASKING)
def test_the_options_are_the_keywords_of_the_function(method: str) -> None:
    modifier: Spec = DEFAULTS[method]
    keywords = inspect.signature(METHODS[method].solve).parameters.values()
    own = {one.name for one in keywords if one.kind is one.KEYWORD_ONLY} - {"row_groups"}
    options = method_config(modifier).options
    assert own >= options.keys()
    assert own - options.keys() <= {"refit_steps"}


# --- shares that the model decides on


def shares_of(modifier: Pruning, model: LanguageModel) -> dict[str, float]:
    return dict(allocate_sparsity(method_config(modifier), modifier, model, TOKENS).options["sparsity"])


@pytest.mark.parametrize("allocation", ["owl", "ramp", "error"])
@pytest.mark.parametrize("kind", [SparseGPTModifier, ALPSModifier])
def test_an_allocation_is_exact_over_all_and_not_uniform(kind: type[Pruning], allocation: str) -> None:
    model = tiny_model(num_hidden_layers=3)
    modifier = kind(sparsity=0.6, allocation=allocation, owl_m=2.0 if allocation == "owl" else 5.0)
    shares = shares_of(modifier, model)
    rows = compress_model(model, TOKENS, [allocate_sparsity(method_config(modifier), modifier, model, TOKENS)])
    assert len(set(shares.values())) > 1
    assert {row.name: row.zeros / row.weights for row in rows} == pytest.approx(shares, abs=1e-12)
    assert sum(row.zeros for row in rows) == round(0.6 * sum(row.weights for row in rows))


def test_the_spread_of_an_allocation_reaches_it() -> None:
    model = tiny_model(num_hidden_layers=3)
    for allocation in ("ramp", "error"):
        narrow, wide = (
            shares_of(SparseGPTModifier(sparsity=0.6, allocation=allocation, allocation_spread=spread), model).values()
            for spread in (0.01, 0.2)
        )
        assert max(narrow) - min(narrow) < 0.03 < max(wide) - min(wide)


def test_the_first_blocks_of_a_ramp_keep_most() -> None:
    shares = shares_of(SparseGPTModifier(sparsity=0.5, allocation="ramp", allocation_spread=0.1), tiny_model())
    by_block = [shares[f"model.layers.{index}.mlp.up_proj"] for index in range(4)]
    assert by_block == sorted(by_block)
    assert by_block[-1] - by_block[0] == pytest.approx(0.2, abs=0.01)


def test_a_uniform_share_needs_no_look_at_the_model() -> None:
    modifier = SparseGPTModifier(sparsity=0.5)
    compression = method_config(modifier)
    assert allocate_sparsity(compression, modifier, tiny_model(), TOKENS) is compression


def test_the_best_allocation_is_the_one_that_hurts_least_on_text_kept_back() -> None:
    model, tokens = tiny_model(), random_tokens(8, 20)
    modifier = SparseGPTModifier(sparsity=0.5, allocation="best", allocation_spread=0.2)
    found = allocate_sparsity(method_config(modifier), modifier, model, tokens)
    names = list(plan_methods(model, [found])[0].target_index)
    surveys, norms = profile_layers(model, tokens[:7], names, multiple=5.0)
    tried = {name: allocate(surveys, 0.5, 0.2) for name, allocate in ALLOCATIONS.items()}
    errors = allocation_errors(model, tokens[7:], tried, norms)
    assert len(set(errors.values())) == len(ALLOCATIONS)
    assert found.allocation == min(errors, key=lambda name: errors[name])
    assert found.options["sparsity"] == tried[found.allocation]


def test_the_best_allocation_needs_text_to_keep_back() -> None:
    modifier = SparseGPTModifier(sparsity=0.5, allocation="best")
    with pytest.raises(DataError, match="calibrate on 2 samples"):
        allocate_sparsity(method_config(modifier), modifier, tiny_model(), random_tokens(1, 20))
