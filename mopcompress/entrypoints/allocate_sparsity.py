"""The share of its weights that each linear loses, where the model decides on it."""

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
    "uniform": lambda surveys, sparsity, _spread: sparsity_allocation.uniform(surveys, sparsity),
    "owl": lambda surveys, sparsity, spread: sparsity_allocation.owl(surveys, sparsity, spread=spread),
    "ramp": lambda surveys, sparsity, spread: sparsity_allocation.ramp(surveys, sparsity, rise=2 * spread),
    "error": lambda surveys, sparsity, spread: sparsity_allocation.equal_marginal_error(
        surveys, sparsity, spread=spread
    ),
}


def allocate_sparsity(
    compression: MethodConfig,
    modifier: Masking | GPTQModifier,
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    *,
    present: Present = no_op,
) -> MethodConfig:
    """The compression with a share for each linear; as it is when all lose the same, or one is given a target.

    `model` is as it was before any compression.
    """
    if isinstance(modifier, GPTQModifier):
        return compression
    globally = isinstance(modifier, MagnitudePruningModifier) and modifier.apply_globally
    if modifier.allocation == "uniform" and not globally:
        return compression
    [step] = plan_methods(model, [compression])
    assert isinstance(modifier.sparsity, float)  # for mypy: a list is one share a target already

    def weights() -> Iterator[tuple[str, Tensor]]:
        for index in range(len(model.blocks)):
            with present(index):
                yield from (
                    (name, weight_of(one))
                    for one, name in linears_of(model, index).items()
                    if name in step.target_index
                )

    if globally:
        shares = global_threshold_sparsities(weights, modifier.sparsity)
    else:
        allocated, shares = _best_allocation(modifier, model, tokens, step.target_index, present)
        compression = replace(compression, allocation=allocated)
    return replace(compression, options={**compression.options, "sparsity": shares})


def _best_allocation(
    modifier: Masking, model: LanguageModel, tokens: Int[Tensor, "samples time"], names: Iterable[str], present: Present
) -> tuple[str, LayerSparsities]:
    """The name of an allocation and its shares; for `best` an eighth of the text is kept for trying them all."""
    trying = modifier.allocation == "best"
    held_out = max(1, len(tokens) // 8) if trying else 0
    if held_out == len(tokens):
        raise DataError("allocation: best tries allocations on text that it has not surveyed; calibrate on 2 samples")
    seen, unseen = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
    surveys, norms = profile_layers(model, seen, names, multiple=modifier.owl_m, present=present)
    assert isinstance(modifier.sparsity, float)  # for mypy: a recipe with a list has no allocation
    shares = {
        name: allocate(surveys, modifier.sparsity, modifier.allocation_spread)
        for name, allocate in ALLOCATIONS.items()
        if trying or name == modifier.allocation
    }
    errors = allocation_errors(model, unseen, shares, norms, present=present) if trying else dict.fromkeys(shares, 0.0)
    best = min(errors, key=lambda name: errors[name])
    return best, shares[best]
