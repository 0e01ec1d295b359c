"""Sparsity per linear, chosen by the model."""

import pytest
from tiny_models import random_tokens, tiny_model

from mopcompress.compress.layer_profile import allocation_errors, profile_layers
from mopcompress.compress.sequential import compress_model, plan_methods
from mopcompress.entrypoints.allocate_sparsity import ALLOCATIONS, allocate_sparsity
from mopcompress.entrypoints.from_recipe import method_config
from mopcompress.errors import DataError
from mopcompress.models.language_model import LanguageModel
from mopcompress.recipe import ALPSModifier, SparseGPTModifier
from mopcompress.recipe.pruning_modifiers import Pruning

TOKENS = random_tokens(6, 20)


def sparsities_of(modifier: Pruning, model: LanguageModel) -> dict[str, float]:
    return dict(allocate_sparsity(method_config(modifier), modifier, model, TOKENS).options["sparsity"])


@pytest.mark.parametrize("allocation", ["owl", "ramp", "error"])
@pytest.mark.parametrize("kind", [SparseGPTModifier, ALPSModifier])
def test_an_allocation_has_the_exact_total_and_is_not_uniform(kind: type[Pruning], allocation: str) -> None:
    model = tiny_model(num_hidden_layers=3)
    modifier = kind(sparsity=0.6, allocation=allocation, owl_m=2.0 if allocation == "owl" else 5.0)
    sparsities = sparsities_of(modifier, model)
    rows = compress_model(model, TOKENS, [allocate_sparsity(method_config(modifier), modifier, model, TOKENS)])
    assert len(set(sparsities.values())) > 1
    assert {row.name: row.zeros / row.weights for row in rows} == pytest.approx(sparsities, abs=1e-12)
    assert sum(row.zeros for row in rows) == round(0.6 * sum(row.weights for row in rows))


def test_the_spread_of_an_allocation_is_used() -> None:
    model = tiny_model(num_hidden_layers=3)
    for allocation in ("ramp", "error"):
        narrow, wide = (
            sparsities_of(
                SparseGPTModifier(sparsity=0.6, allocation=allocation, allocation_spread=spread), model
            ).values()
            for spread in (0.01, 0.2)
        )
        assert max(narrow) - min(narrow) < 0.03 < max(wide) - min(wide)


def test_a_ramp_prunes_the_first_blocks_least() -> None:
    sparsities = sparsities_of(SparseGPTModifier(sparsity=0.5, allocation="ramp", allocation_spread=0.1), tiny_model())
    by_block = [sparsities[f"model.layers.{index}.mlp.up_proj"] for index in range(4)]
    assert by_block == sorted(by_block)
    assert by_block[-1] - by_block[0] == pytest.approx(0.2, abs=0.01)


def test_a_uniform_sparsity_leaves_the_config_unchanged() -> None:
    modifier = SparseGPTModifier(sparsity=0.5)
    config = method_config(modifier)
    assert allocate_sparsity(config, modifier, tiny_model(), TOKENS) is config


def test_the_best_allocation_has_the_lowest_held_out_error() -> None:
    model, tokens = tiny_model(), random_tokens(8, 20)
    modifier = SparseGPTModifier(sparsity=0.5, allocation="best", allocation_spread=0.2)
    config = allocate_sparsity(method_config(modifier), modifier, model, tokens)
    names = list(plan_methods(model, [config])[0].target_index)
    profiles, norms = profile_layers(model, tokens[:7], names, multiple=5.0)
    sparsities = {name: allocate(profiles, 0.5, 0.2) for name, allocate in ALLOCATIONS.items()}
    errors = allocation_errors(model, tokens[7:], sparsities, norms)
    assert len(set(errors.values())) == len(ALLOCATIONS)
    assert config.allocation == min(errors, key=lambda name: errors[name])
    assert config.options["sparsity"] == sparsities[config.allocation]


def test_the_best_allocation_needs_held_out_text() -> None:
    modifier = SparseGPTModifier(sparsity=0.5, allocation="best")
    with pytest.raises(DataError, match="calibrate on 2 samples"):
        allocate_sparsity(method_config(modifier), modifier, tiny_model(), random_tokens(1, 20))
