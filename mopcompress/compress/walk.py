"""Compress a model block by block, in one pass of the calibration tokens.

All calibration tokens enter a block together, and every linear is compressed *when its input arrives*, before it gives
an output. So each linear is calibrated on the compressed ones before it, inside the block too (true-sequential), and
every sub-layer is computed exactly once. SparseGPT's released code and llm-compressor run every block twice, and
calibrate all linears of a block on that block's dense weights.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mopcompress.compress import METHODS, Solved
from mopcompress.compress.targets import chosen
from mopcompress.errors import MopError, NumericalError
from mopcompress.models.language_model import LanguageModel

Linear = nn.Linear | Conv1D


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """What was done to one linear, counted afterwards."""

    name: str
    block: int
    blocks: int
    weights: int
    zeros: int
    escalations: int  # how often the damping had to be raised; 0 when the Gram matrix was well-conditioned
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Compression:
    """A method with its settings, and the linears that it goes to (SparseML's `targets` and `ignore`)."""

    method: str
    options: dict[str, object]  # the keyword arguments of the method's function
    targets: Sequence[str] = ("Linear",)
    ignore: Sequence[str] = ()


def compress_model(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    compression: Compression,
    *,
    progress: Callable[[LayerRow], None] = lambda row: None,
) -> list[LayerRow]:
    """Compress the linears of all decoder blocks in place; embeddings and head are never touched.

    Raises `DataError` when a target means no linear, `NumericalError` naming the layer when its calibration is beyond
    repair.
    """
    every = [
        {
            linear: f"{model.blocks_prefix()}.{index}.{name}"
            for name, linear in block.named_modules()
            if isinstance(linear, Linear)
        }
        for index, block in enumerate(model.blocks)
    ]
    names = [name for linears in every for name in linears.values()]
    wanted = chosen(names, compression.targets, compression.ignore)
    blocks = [{linear: name for linear, name in linears.items() if name in wanted} for linears in every]
    rows: list[LayerRow] = []
    hidden = None
    with torch.inference_mode():
        for index, linears in enumerate(blocks):
            with noting_inputs(linears) as first_inputs:
                model.through(tokens[:1, :1], None if hidden is None else hidden[:1, :1], index)
            alone = [[linear] for linear in linears if linear not in first_inputs]  # such as experts of another token
            with compressing_on_arrival(linears, [*_sharing(first_inputs), *alone], compression) as settled:
                hidden = model.through(tokens, hidden, index)
            missed = set(linears) - {linear for linear, _, _ in settled}
            if missed:
                raise NumericalError(f"{linears[missed.pop()]}: no calibration token reached it; use other text")
            for linear, solved, seconds in settled:
                rows.append(_row(linears[linear], index, len(blocks), linear, solved, seconds))
                progress(rows[-1])
    return rows


Settled = list[tuple[Linear, Solved, float]]


@contextmanager
def noting_inputs(linears: Iterable[Linear]) -> Iterator[dict[Linear, Tensor]]:
    """Inside the block, note the first input of each linear."""
    seen: dict[Linear, Tensor] = {}
    with _before(linears, lambda linear, value: seen.setdefault(linear, value)):
        yield seen


@contextmanager
def compressing_on_arrival(
    names: Mapping[Linear, str], groups: Sequence[Sequence[Linear]], compression: Compression
) -> Iterator[Settled]:
    """Inside the block, the linears of a group are compressed when the input that they share arrives at the first."""
    method = METHODS[compression.method]
    waiting = {linear: group for group in groups for linear in group}
    settled: Settled = []

    def arrive(linear: Linear, inputs: Tensor) -> None:
        group = waiting.get(linear)
        if group is None:
            return
        start = time.perf_counter()
        try:
            statistic = method.statistic(inputs.flatten(0, -2))
            solutions = method.solve_together([_weight(one) for one in group], statistic, **compression.options)
        except MopError as error:
            raise type(error)(f"{names[linear]}: {error}") from error
        seconds = (time.perf_counter() - start) / len(group)
        for one, solved in zip(group, solutions, strict=True):
            _weight(one).copy_(solved.weight)
            settled.append((one, solved, seconds))
            del waiting[one]

    with _before(waiting, arrive):
        yield settled


@contextmanager
def _before(linears: Iterable[Linear], act: Callable[[Linear, Tensor], object]) -> Iterator[None]:
    """Inside the block, `act(linear, input)` runs before each linear. Hooks exist here and nowhere else."""
    handles = [
        linear.register_forward_pre_hook(lambda linear, inputs: _nothing(act(linear, inputs[0]))) for linear in linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sharing(inputs: dict[Linear, Tensor]) -> list[list[Linear]]:
    """Linears that were given the very same tensor, such as q, k and v: one Gram matrix and one sweep serve them."""
    groups: dict[int, list[Linear]] = {}
    for linear, value in inputs.items():
        groups.setdefault(id(value), []).append(linear)
    return list(groups.values())


def _nothing(_result: object) -> None:
    """A hook's answer would replace the input."""


def _weight(linear: Linear) -> Tensor:
    """The weight as [out, in]; GPT-2's Conv1D stores it transposed."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def _row(name: str, block: int, blocks: int, linear: Linear, solved: Solved, seconds: float) -> LayerRow:
    return LayerRow(
        name=name,
        block=block,
        blocks=blocks,
        weights=linear.weight.numel(),
        zeros=int((linear.weight == 0).sum()),
        escalations=solved.escalations,
        seconds=seconds,
    )
