"""Compress a model block by block, in one pass of the calibration tokens.

All calibration tokens enter a block together, and every linear is compressed *when its input arrives*, before it gives
an output. So each linear is calibrated on the compressed ones before it, inside the block too (true-sequential), and
every sub-layer is computed exactly once. SparseGPT's released code and llm-compressor run every block twice, and
calibrate all linears of a block on that block's dense weights.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mopcompress.compress import METHODS
from mopcompress.errors import DataError, MopError, NumericalError
from mopcompress.models.language_model import LanguageModel


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

    def goes_to(self, name: str) -> bool:
        """Whether the linear with this dotted name is compressed."""
        return _matches(name, self.targets) and not _matches(name, self.ignore)


def compress_model(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    compression: Compression,
    *,
    progress: Callable[[LayerRow], None] = lambda row: None,
) -> list[LayerRow]:
    """Compress the linears of all decoder blocks in place; embeddings and head are never touched.

    Raises `DataError` when no linear matches, `NumericalError` naming the layer when its calibration is beyond repair.
    """
    prefix = model.blocks_prefix()
    chosen = [
        {
            linear: f"{prefix}.{index}.{name}"
            for name, linear in block.named_modules()
            if isinstance(linear, nn.Linear | Conv1D) and compression.goes_to(f"{prefix}.{index}.{name}")
        }
        for index, block in enumerate(model.blocks)
    ]
    if not any(chosen):
        raise DataError(f"no linear of the model matches targets {list(compression.targets)}; try [Linear]")
    rows: list[LayerRow] = []

    def note(name: str, index: int, linear: nn.Module, escalations: int, seconds: float) -> None:
        zeros = int((linear.weight == 0).sum())
        rows.append(
            LayerRow(
                name=name, block=index, blocks=len(chosen), weights=linear.weight.numel(), zeros=zeros,
                escalations=escalations, seconds=seconds,
            )
        )  # fmt: skip
        progress(rows[-1])

    with torch.inference_mode():
        hidden = None
        for index, linears in enumerate(chosen):
            with compressing_on_arrival(linears, compression, lambda *facts, index=index: note(facts[0], index, *facts[1:])):
                hidden = model.through(tokens, hidden, index)
            missed = set(linears.values()) - {row.name for row in rows}
            if missed:
                raise NumericalError(f"{min(missed)}: no calibration token reached it; use other calibration text")
    return rows


@contextmanager
def compressing_on_arrival(
    linears: dict[nn.Module, str], compression: Compression, note: Callable[[str, nn.Module, int, float], None]
) -> Iterator[None]:
    """Inside the block, each linear is compressed when its first input arrives. Hooks exist here and nowhere else."""
    method = METHODS[compression.method]
    shared: dict[str, object] = {}  # q, k and v (gate and up) get the very same tensor: its statistic is made once

    def arrive(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        name = pending.pop(linear, None)
        if name is None:
            return
        start = time.perf_counter()
        try:
            if shared.get("input") is not inputs[0]:
                shared.update(input=inputs[0], statistic=method.statistic(inputs[0].flatten(0, -2)))
            transposed = isinstance(linear, Conv1D)
            weight = linear.weight.T.contiguous() if transposed else linear.weight
            solved = method.solve(weight, shared["statistic"], **compression.options)
        except MopError as error:
            raise type(error)(f"{name}: {error}") from error
        linear.weight.copy_(solved.weight.T if transposed else solved.weight)
        note(name, linear, solved.escalations, time.perf_counter() - start)

    pending = dict(linears)
    handles = [linear.register_forward_pre_hook(arrive) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(
        re.match(pattern[3:], name) or re.match(pattern[3:], f"{name}.weight")
        if pattern.startswith("re:")
        else pattern in {"Linear", "__ALL__", name, f"{name}.weight"}
        for pattern in patterns
    )
