"""Structured pruning of a model, block by block in one pass: whole MLP channels and whole key-value groups go.

As in `sequential.py`, a matrix is solved when its input arrives, calibrated on all that was pruned before it, and every
sub-layer runs once. The matrix that reads the channels or heads becomes smaller and receives only the inputs that it
still reads; the matrices that write them lose their rows after the block has run. Every block loses equally many,
because the configuration has one number for all blocks.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mopcompress.algorithms.gram import InputGram
from mopcompress.algorithms.structured import prune_input_groups
from mopcompress.errors import DataError, MopError, NumericalError
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, forward_hooks, set_weight, weight_of
from mopcompress.models.resizing import (
    PrunableGroups,
    adopt_sizes,
    build_resized,
    channel_sizes,
    check_resized,
    find_attention,
    find_mlp,
    head_sizes,
)

_TOLERANCE = 1e-3  # relative difference of hidden states that comes from another order of operations, at most


@dataclass(frozen=True, kw_only=True)
class StructuredConfig:
    """The fractions of MLP channels and of key-value groups to remove from every block, and the criterion."""

    mlp_sparsity: float
    head_sparsity: float = 0.0
    score: str = "error"  # or "norm"; see `prune_input_groups`
    damping: float = 0.01


@dataclass(frozen=True, kw_only=True)
class StructuredRow:
    """The pruning of the MLP or the attention of one block; weights are counted afterwards."""

    name: str  # of the matrix that reads the channels or heads
    block: int
    blocks: int
    kind: str  # channels, or kv_groups
    before: int  # channels or groups
    after: int
    weights_before: int  # in all matrices that read or write them
    weights: int
    error: float  # squared error of the reader's output on the calibration text, relative to the squared output
    escalations: int  # how often damping increased
    seconds: float


@dataclass(frozen=True)
class StructuredResult:
    """The rows of all blocks, and the new sizes of the network."""

    rows: list[StructuredRow]
    sizes: dict[str, int]  # the keys of `config.json` that hold the numbers of channels and heads


@dataclass(frozen=True)
class GroupPruning:
    """A kind of groups, the number of them to remove from every block, and the criterion."""

    kind: str
    find: Callable[[LanguageModel, int], PrunableGroups]
    remove: int
    score: str
    damping: float


def prune_structured(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    config: StructuredConfig,
    *,
    progress: Callable[[StructuredRow], None] = lambda row: None,
) -> StructuredResult:
    """Remove channels and heads from all decoder blocks, and from the network's configuration, in place.

    Raises `DataError`, before any change, when the family cannot have fewer, or when a fraction rounds to none or all
    of them. Raises `DataError`, after the change, when the family computes something else with fewer. Raises
    `NumericalError` naming the matrix when its calibration cannot be used.
    """
    prunings, sizes = _plan_prunings(model, config)
    rows: list[StructuredRow] = []
    if not prunings:
        return StructuredResult(rows, sizes)
    resized = _build_checked_resized(model, prunings, sizes)
    hidden = None
    with torch.no_grad():  # not inference mode: prompts may be trained through the pruned weights
        for index in range(len(model.blocks)):
            hidden, block_rows = _prune_block(model, tokens, hidden, index, prunings)
            for row in block_rows:
                rows.append(row)
                progress(row)
        assert hidden is not None  # a model has blocks
        adopt_sizes(model.network, resized, sizes)
        _check_outputs(model, tokens[:1], hidden[:1])
    return StructuredResult(rows, sizes)


def _plan_prunings(model: LanguageModel, config: StructuredConfig) -> tuple[list[GroupPruning], dict[str, int]]:
    prunings: list[GroupPruning] = []
    sizes: dict[str, int] = {}
    for kind, fraction, find, sizes_for in (
        ("kv_groups", config.head_sparsity, find_attention, head_sizes),
        ("channels", config.mlp_sparsity, find_mlp, channel_sizes),
    ):
        if fraction == 0:
            continue
        counts = {find(model, index).groups for index in range(len(model.blocks))}
        if len(counts) > 1:
            raise DataError(f"blocks have between {min(counts)} and {max(counts)} {kind}; they must have equally many")
        count = counts.pop()
        remove = round(fraction * count)
        if not 0 < remove < count:
            removed = "none" if remove == 0 else "all"
            raise DataError(
                f"a fraction of {fraction:g} of {count} {kind} is {removed} of them; ask for 0, or for a whole number "
                f"of {count}ths, with at least one left"
            )
        prunings.append(GroupPruning(kind, find, remove, config.score, config.damping))
        sizes |= sizes_for(model, count - remove)
    return prunings, sizes


def _build_checked_resized(
    model: LanguageModel, prunings: Sequence[GroupPruning], sizes: Mapping[str, int]
) -> PreTrainedModel:
    blocks = range(len(model.blocks))
    parts = [(pruning.find(model, index), pruning.remove) for index in blocks for pruning in prunings]
    resized = build_resized(model.network, sizes)
    shapes = {linear: shape for part, remove in parts for linear, shape in part.shapes(part.groups - remove).items()}
    check_resized(model.network, resized, shapes, sizes)
    return resized


def _prune_block(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    hidden: Float[Tensor, "samples time hidden"] | None,
    index: int,
    prunings: Sequence[GroupPruning],
) -> tuple[Float[Tensor, "samples time hidden"], list[StructuredRow]]:
    parts = {part.reader: (part, pruning) for pruning in prunings for part in [pruning.find(model, index)]}
    weights_before = {reader: part.weights for reader, (part, _) in parts.items()}
    with prune_on_input(parts) as reduced:
        hidden = model.run_block(tokens, hidden, index)
    for part, _ in parts.values():
        if part.reader not in reduced:
            raise NumericalError(f"{part.name}: no calibration token reached it; use other text")
    rows = []
    for reader, result in reduced.items():
        part, pruning = parts[reader]
        width = len(result.columns) // (part.groups - pruning.remove)
        part.cut_writers(result.columns[::width] // width)
        rows.append(
            StructuredRow(
                name=part.name,
                block=index,
                blocks=len(model.blocks),
                kind=pruning.kind,
                before=part.groups,
                after=weight_of(reader).shape[1] // width,
                weights_before=weights_before[reader],
                weights=part.weights,
                error=result.error,
                escalations=result.escalations,
                seconds=result.seconds,
            )
        )
    return hidden, rows


@dataclass(frozen=True)
class ReducedInput:
    """The inputs that a matrix still reads, and the error of its outputs without the others."""

    columns: Int[Tensor, " remaining"]
    error: float  # squared, relative to the squared outputs
    escalations: int
    seconds: float


@contextmanager
def prune_on_input(parts: Mapping[Linear, tuple[PrunableGroups, GroupPruning]]) -> Iterator[dict[Linear, ReducedInput]]:
    """Prune each of these matrices when its input arrives, inside the `with` block; it then reads the other inputs."""
    reduced: dict[Linear, ReducedInput] = {}

    def reduce_input(reader: Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if reader not in reduced:
            part, pruning = parts[reader]
            try:
                reduced[reader] = _prune_reader(reader, inputs[0].flatten(0, -2), part.groups, pruning)
            except MopError as error:
                raise type(error)(f"{part.name}: {error}") from error
        return (inputs[0][..., reduced[reader].columns], *inputs[1:])

    with forward_hooks(parts, reduce_input, pre=True):
        yield reduced


def _prune_reader(
    reader: Linear, inputs: Float[Tensor, "tokens in"], groups: int, pruning: GroupPruning
) -> ReducedInput:
    """Prune the matrix in place; its bias, if it has one, absorbs the mean of the lost output."""
    start = time.perf_counter()
    weight, bias = weight_of(reader), reader.bias
    accumulator = InputGram()
    accumulator.update(inputs if bias is None else inputs - inputs.mean(0))
    gram = accumulator.mean()
    solved = prune_input_groups(
        weight, gram, groups=groups, remove=pruning.remove, score=pruning.score, damping=pruning.damping
    )
    lost = weight.clone()
    lost[:, solved.columns] -= solved.weight
    size = float((weight @ gram * weight).sum())
    error = float((lost @ gram * lost).sum()) / size if size > 0 else 0.0
    set_weight(reader, solved.weight, None if bias is None else bias + lost @ inputs.mean(0))
    return ReducedInput(solved.columns, error, solved.escalations, time.perf_counter() - start)


def _check_outputs(
    model: LanguageModel, tokens: Int[Tensor, "samples time"], hidden: Float[Tensor, "samples time hidden"]
) -> None:
    """Raise `DataError` when the pruned network, run as a whole, does not reproduce the outputs of its blocks."""
    output = model.network.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    difference = float((output - hidden).norm() / hidden.norm())
    if not difference <= _TOLERANCE:
        raise DataError(
            f"pruned, {type(model.network).__name__} computes something else (relative difference {difference:.2g}): "
            "this family uses its heads or channels in an unknown way; leave head_sparsity or mlp_sparsity at 0"
        )
