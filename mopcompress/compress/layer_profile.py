"""Before anything is removed: what the dense model's linears are like, and which allocation would hurt least."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.algorithms.input_statistics import InputNorms
from mopcompress.algorithms.masks import lowest_overall
from mopcompress.algorithms.sparsity_allocation import LayerProfile, LayerSparsities, profile_block
from mopcompress.compress.dense_pass import record_inputs
from mopcompress.compress.sequential import linears_of
from mopcompress.errors import DataError
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import weight_of

Present = Callable[[int], AbstractContextManager[None]]
"""Inside `present(index)`, block `index` of the model has its weights."""
Norms = dict[str, Float[Tensor, " _"]]


def no_op(_index: int) -> AbstractContextManager[None]:
    """For a model that is in memory as a whole."""
    return nullcontext()


@torch.inference_mode()
def profile_layers(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    names: Iterable[str],
    *,
    multiple: float,
    present: Present = no_op,
) -> tuple[dict[str, LayerProfile], Norms]:
    """One dense pass: a survey of each named linear, and the root mean squares of its inputs.

    `multiple` of the mean score makes an outlier (OWL's M). Raises `DataError` when no token reaches a linear.
    """
    wanted, surveys, norms = set(names), dict[str, LayerProfile](), Norms()
    hidden = None
    for index in range(len(model.blocks)):
        with present(index):
            linears = {name: one for one, name in linears_of(model, index).items() if name in wanted}
            with record_inputs(linears.values()) as inputs:
                hidden = model.run_block(tokens, hidden, index)
            unseen = [name for name, one in linears.items() if one not in inputs]
            if unseen:
                raise DataError(f"{unseen[0]}: no calibration token reached it, so nothing can be allocated to it")
            here = {name: _norms(inputs[one]) for name, one in linears.items()}
            weights = {name: weight_of(one) for name, one in linears.items()}
            surveys |= profile_block(weights, here, block=index, multiple=multiple) if here else {}
            norms |= here
    return surveys, norms


@torch.inference_mode()
def errors_of(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    candidates: Mapping[str, LayerSparsities],
    norms: Norms,
    *,
    present: Present = no_op,
) -> dict[str, float]:
    """How far each allocation takes the states that the head reads from the dense ones, relative and squared.

    A trial of the allocation alone: weights go by Wanda's score over the whole matrix, nothing is refitted. One pass of
    the blocks serves all candidates. Give it `tokens` that `norms` have not seen.
    """
    hidden: dict[str, Tensor | None] = dict.fromkeys(candidates)
    dense = None
    for index in range(len(model.blocks)):
        with present(index):
            for name, shares in candidates.items():
                with _pruned(model, index, shares, norms):
                    hidden[name] = model.run_block(tokens, hidden[name], index)
            dense = model.run_block(tokens, dense, index)
    assert dense is not None
    return {
        name: float((one - dense).square().sum() / dense.square().sum())
        for name, one in hidden.items()
        if one is not None
    }


@contextmanager
def _pruned(model: LanguageModel, index: int, shares: LayerSparsities, norms: Norms) -> Iterator[None]:
    """Inside, the linears of the block have lost their shares."""
    weights = {name: weight_of(one) for one, name in linears_of(model, index).items() if name in shares}
    before = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.masked_fill_(lowest_overall(weight.abs() * norms[name].to(weight), shares[name]), 0.0)
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(before[name])


def _norms(inputs: Tensor) -> Float[Tensor, " in"]:
    seen = InputNorms()
    seen.update(inputs.flatten(0, -2))
    return seen.mean()
