"""Statistics of the dense model per linear, for OWL and other allocations, and the error of each allocation."""

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
"""Inside `with present(index)`, block `index` of the model has its weights in memory."""
Norms = dict[str, Float[Tensor, " _"]]
"""The root mean square of each input of a linear, by the linear's name."""


def no_op(_index: int) -> AbstractContextManager[None]:
    """Do nothing: the `present` of a model with all blocks in memory."""
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
    """Profile each named linear, and return the root mean squares of its inputs, from a single dense pass.

    An outlier is a weight whose score is above `multiple` times the mean (OWL's M). Raises `DataError` when no token
    reaches a linear.
    """
    selected, profiles, norms = set(names), dict[str, LayerProfile](), Norms()
    hidden = None
    for index in range(len(model.blocks)):
        with present(index):
            linears = {name: linear for linear, name in linears_of(model, index).items() if name in selected}
            with record_inputs(linears.values()) as inputs:
                hidden = model.run_block(tokens, hidden, index)
            unreached = [name for name, linear in linears.items() if linear not in inputs]
            if unreached:
                raise DataError(f"{unreached[0]}: no calibration token reached it, so nothing can be allocated to it")
            block_norms = {name: _norms(inputs[linear]) for name, linear in linears.items()}
            weights = {name: weight_of(linear) for name, linear in linears.items()}
            profiles |= profile_block(weights, block_norms, block=index, multiple=multiple) if block_norms else {}
            norms |= block_norms
    return profiles, norms


@torch.inference_mode()
def allocation_errors(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    candidates: Mapping[str, LayerSparsities],
    norms: Norms,
    *,
    present: Present = no_op,
) -> dict[str, float]:
    """Measure how far each allocation moves the final hidden states from the dense ones: relative squared error.

    This tries the allocation alone: masks take Wanda's scores over the whole matrix, without a refit. The passes of all
    candidates share each load of a block. `tokens` must be other tokens than those of `norms`.
    """
    hidden: dict[str, Tensor | None] = dict.fromkeys(candidates)
    dense = None
    for index in range(len(model.blocks)):
        with present(index):
            for name, sparsities in candidates.items():
                with _pruned(model, index, sparsities, norms):
                    hidden[name] = model.run_block(tokens, hidden[name], index)
            dense = model.run_block(tokens, dense, index)
    assert dense is not None
    return {
        name: float((states - dense).square().sum() / dense.square().sum())
        for name, states in hidden.items()
        if states is not None
    }


@contextmanager
def _pruned(model: LanguageModel, index: int, sparsities: LayerSparsities, norms: Norms) -> Iterator[None]:
    """Prune the linears of a block to `sparsities`, inside the `with` block only."""
    weights = {name: weight_of(linear) for linear, name in linears_of(model, index).items() if name in sparsities}
    dense_weights = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.masked_fill_(lowest_overall(weight.abs() * norms[name].to(weight), sparsities[name]), 0.0)
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(dense_weights[name])


def _norms(inputs: Tensor) -> Float[Tensor, " in"]:
    accumulator = InputNorms()
    accumulator.update(inputs.flatten(0, -2))
    return accumulator.mean()
