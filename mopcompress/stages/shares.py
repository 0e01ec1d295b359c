"""The share of its weights that each linear loses, where the model decides on it."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from mopcompress.compress import allocation
from mopcompress.compress.allocation import Shares, Survey
from mopcompress.compress.compression import Compression
from mopcompress.compress.magnitude import one_threshold
from mopcompress.compress.survey import Present, always, survey_model
from mopcompress.compress.walk import linears_of, planned, weight_of
from mopcompress.models.language_model import LanguageModel
from mopcompress.recipe import GPTQModifier, MagnitudePruningModifier
from mopcompress.recipe.modifiers import Pruning

ALLOCATIONS: dict[str, Callable[[dict[str, Survey], float, float], Shares]] = {
    "owl": lambda surveys, sparsity, spread: allocation.owl(surveys, sparsity, spread=spread),
    "ramp": lambda surveys, sparsity, spread: allocation.ramp(surveys, sparsity, rise=2 * spread),
    "error": lambda surveys, sparsity, spread: allocation.equal_cost(surveys, sparsity, spread=spread),
}


def with_shares(
    compression: Compression,
    modifier: Pruning | GPTQModifier,
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    *,
    present: Present = always,
) -> Compression:
    """The compression with a share for each linear; as it is when all lose the same, or one is given a target.

    `model` is as it was before any compression.
    """
    if isinstance(modifier, GPTQModifier) or isinstance(modifier.sparsity, tuple):
        return compression
    [step] = planned(model, [compression])

    def weights() -> Iterator[tuple[str, Tensor]]:
        for index in range(len(model.blocks)):
            with present(index):
                yield from (
                    (name, weight_of(one)) for one, name in linears_of(model, index).items() if name in step.place
                )

    if isinstance(modifier, MagnitudePruningModifier) and modifier.apply_globally:
        shares = one_threshold(weights, modifier.sparsity)
    elif modifier.allocation in ALLOCATIONS:
        surveys, _ = survey_model(model, tokens, step.place, multiple=modifier.owl_m, present=present)
        shares = ALLOCATIONS[modifier.allocation](surveys, modifier.sparsity, modifier.allocation_spread)
    else:
        return compression
    return replace(compression, options={**compression.options, "sparsity": shares})
