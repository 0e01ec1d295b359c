"""Sparsity per linear, for a recipe that leaves it to the model (OWL and others) or to one global threshold."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from mopcompress.algorithms import sparsity_allocation
from mopcompress.algorithms.magnitude import global_threshold_sparsities
from mopcompress.algorithms.sparsity_allocation import LayerProfile, LayerSparsities
from mopcompress.compress.layer_profile import Present, allocation_errors, no_op, profile_layers
from mopcompress.compress.plan import MethodConfig
from mopcompress.compress.sequential import linears_of, plan_methods
from mopcompress.errors import DataError
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import weight_of
from mopcompress.recipe import GPTQModifier, MagnitudePruningModifier
from mopcompress.recipe.pruning_modifiers import Masking

ALLOCATIONS: dict[str, Callable[[dict[str, LayerProfile], float, float], LayerSparsities]] = {
    "uniform": lambda profiles, sparsity, _spread: sparsity_allocation.uniform(profiles, sparsity),
    "owl": lambda profiles, sparsity, spread: sparsity_allocation.owl(profiles, sparsity, spread=spread),
    "ramp": lambda profiles, sparsity, spread: sparsity_allocation.ramp(profiles, sparsity, rise=2 * spread),
    "error": lambda profiles, sparsity, spread: sparsity_allocation.equal_marginal_error(
        profiles, sparsity, spread=spread
    ),
}


def allocate_sparsity(
    config: MethodConfig,
    modifier: Masking | GPTQModifier,
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    *,
    present: Present = no_op,
) -> MethodConfig:
    """Return `config` with a sparsity per linear, or unchanged when the recipe gives every linear its sparsity.

    `model` must be the model before any compression, and `tokens` are its calibration windows.
    """
    if isinstance(modifier, GPTQModifier):
        return config
    globally = isinstance(modifier, MagnitudePruningModifier) and modifier.apply_globally
    if modifier.allocation == "uniform" and not globally:
        return config
    [planned] = plan_methods(model, [config])
    assert isinstance(modifier.sparsity, float)  # for mypy: a list has a sparsity per target already

    def weights() -> Iterator[tuple[str, Tensor]]:
        for index in range(len(model.blocks)):
            with present(index):
                yield from (
                    (name, weight_of(linear))
                    for linear, name in linears_of(model, index).items()
                    if name in planned.target_index
                )

    if globally:
        sparsities = global_threshold_sparsities(weights, modifier.sparsity)
    else:
        allocation, sparsities = _best_allocation(modifier, model, tokens, planned.target_index, present)
        config = replace(config, allocation=allocation)
    return replace(config, options={**config.options, "sparsity": sparsities})


def _best_allocation(
    modifier: Masking, model: LanguageModel, tokens: Int[Tensor, "samples time"], names: Iterable[str], present: Present
) -> tuple[str, LayerSparsities]:
    """Return the name of an allocation and its sparsities; `best` compares all on a held-out eighth of the text."""
    tries_all = modifier.allocation == "best"
    held_out = max(1, len(tokens) // 8) if tries_all else 0
    if held_out == len(tokens):
        raise DataError("allocation: best tries allocations on text that it has not surveyed; calibrate on 2 samples")
    profiled, test = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
    profiles, norms = profile_layers(model, profiled, names, multiple=modifier.owl_m, present=present)
    assert isinstance(modifier.sparsity, float)  # for mypy: a recipe with a list has no allocation
    sparsities = {
        name: allocate(profiles, modifier.sparsity, modifier.allocation_spread)
        for name, allocate in ALLOCATIONS.items()
        if tries_all or name == modifier.allocation
    }
    if not tries_all:
        return modifier.allocation, sparsities[modifier.allocation]
    errors = allocation_errors(model, test, sparsities, norms, present=present)
    best = min(errors, key=lambda name: errors[name])
    return best, sparsities[best]
