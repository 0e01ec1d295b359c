"""Structured pruning of a model, block by block in one pass: whole MLP channels and whole key-value groups go.

As in `walk`, a matrix is solved when its input arrives, calibrated on all that was narrowed before it, and every
sub-layer is computed once: the matrix that reads the channels or heads is made smaller and given what it still reads;
those that write them lose their rows when the block has run. Every block loses equally many, because the configuration
has one number for all.
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
    attention_of,
    build_resized,
    channel_sizes,
    check_resized,
    head_sizes,
    mlp_of,
)

_SAME = 1e-3  # how far, relative to their size, hidden states may lie apart that are computed in another order


@dataclass(frozen=True, kw_only=True)
class StructuredConfig:
    """Shares of MLP channels and of key-value groups to remove from every block, and how to choose them."""

    mlp_sparsity: float
    head_sparsity: float = 0.0
    score: str = "error"
    damping: float = 0.01


@dataclass(frozen=True, kw_only=True)
class StructuredRow:
    """What was done to the MLP or the attention of one block, counted afterwards."""

    name: str  # of the matrix that reads the channels or heads
    block: int
    blocks: int
    kind: str  # channels, or kv_groups
    before: int
    after: int
    weights_before: int  # in all matrices around them
    weights: int
    error: float  # share of the reader's output that is lost on the calibration text: squared, against its own size
    escalations: int  # how often the damping had to be raised
    seconds: float


@dataclass(frozen=True)
class StructuredResult:
    """The rows, and the keys of `config.json` that say how many channels and heads there are now."""

    rows: list[StructuredRow]
    sizes: dict[str, int]


@dataclass(frozen=True)
class GroupPruning:
    """So many groups of one kind to remove from every block, chosen in one way."""

    kind: str
    find: Callable[[LanguageModel, int], PrunableGroups]
    remove: int
    score: str
    damping: float


def prune_structured(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    narrowing: StructuredConfig,
    *,
    progress: Callable[[StructuredRow], None] = lambda row: None,
) -> StructuredResult:
    """Remove channels and heads from all decoder blocks in place, in the network's configuration too.

    Raises `DataError`, before anything is changed, when the family cannot have fewer, or a share is none of them or
    all; `NumericalError` naming the matrix when its calibration is beyond repair.
    """
    cuts, sizes = _plan(model, narrowing)
    rows: list[StructuredRow] = []
    if not cuts:
        return StructuredResult(rows, sizes)
    narrower = _build_checked_resized(model, cuts, sizes)
    hidden = None
    with torch.no_grad():  # no inference tensors: prompts may be trained through the narrowed weights
        for index in range(len(model.blocks)):
            hidden, done = _prune_block(model, tokens, hidden, index, cuts)
            for row in done:
                rows.append(row)
                progress(row)
        assert hidden is not None  # a model has blocks
        adopt_sizes(model.network, narrower, sizes)
        _check_same(model, tokens[:1], hidden[:1])
    return StructuredResult(rows, sizes)


def _plan(model: LanguageModel, narrowing: StructuredConfig) -> tuple[list[GroupPruning], dict[str, int]]:
    cuts: list[GroupPruning] = []
    sizes: dict[str, int] = {}
    for kind, share, find, keys in (
        ("kv_groups", narrowing.head_sparsity, attention_of, head_sizes),
        ("channels", narrowing.mlp_sparsity, mlp_of, channel_sizes),
    ):
        if share == 0:
            continue
        counts = {find(model, index).groups for index in range(len(model.blocks))}
        if len(counts) > 1:
            raise DataError(f"blocks have between {min(counts)} and {max(counts)} {kind}; they must have equally many")
        count = counts.pop()
        remove = round(share * count)
        if not 0 < remove < count:
            raise DataError(
                f"a share of {share:g} of {count} {kind} is {'none' if remove == 0 else 'all'} of them; ask for 0, or "
                f"for a whole number of {count}ths, with one left"
            )
        cuts.append(GroupPruning(kind, find, remove, narrowing.score, narrowing.damping))
        sizes |= keys(model, count - remove)
    return cuts, sizes


def _build_checked_resized(
    model: LanguageModel, cuts: Sequence[GroupPruning], sizes: Mapping[str, int]
) -> PreTrainedModel:
    parts = [(cut.find(model, index), cut.remove) for index in range(len(model.blocks)) for cut in cuts]
    narrower = build_resized(model.network, sizes)
    shapes = {linear: shape for part, remove in parts for linear, shape in part.shapes(part.groups - remove).items()}
    check_resized(model.network, narrower, shapes, sizes)
    return narrower


def _prune_block(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    hidden: Float[Tensor, "samples time hidden"] | None,
    index: int,
    cuts: Sequence[GroupPruning],
) -> tuple[Float[Tensor, "samples time hidden"], list[StructuredRow]]:
    parts = {part.reader: (part, cut) for cut in cuts for part in [cut.find(model, index)]}
    before = {reader: part.weights for reader, (part, _) in parts.items()}
    with prune_on_input(parts) as done:
        hidden = model.run_block(tokens, hidden, index)
    for part, _ in parts.values():
        if part.reader not in done:
            raise NumericalError(f"{part.name}: no calibration token reached it; use other text")
    rows = []
    for reader, settled in done.items():
        part, cut = parts[reader]
        width = len(settled.kept) // (part.groups - cut.remove)
        part.cut_writers(settled.kept[::width] // width)
        rows.append(
            StructuredRow(
                name=part.name,
                block=index,
                blocks=len(model.blocks),
                kind=cut.kind,
                before=part.groups,
                after=weight_of(reader).shape[1] // width,
                weights_before=before[reader],
                weights=part.weights,
                error=settled.error,
                escalations=settled.escalations,
                seconds=settled.seconds,
            )
        )
    return hidden, rows


@dataclass(frozen=True)
class ReducedInput:
    """Which inputs a matrix still reads, and what that cost."""

    kept: Int[Tensor, " kept"]
    error: float
    escalations: int
    seconds: float


@contextmanager
def prune_on_input(parts: Mapping[Linear, tuple[PrunableGroups, GroupPruning]]) -> Iterator[dict[Linear, ReducedInput]]:
    """Inside the block, each of these matrices is narrowed when its input arrives, and then reads what is left."""
    done: dict[Linear, ReducedInput] = {}

    def arrive(reader: Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if reader not in done:
            part, cut = parts[reader]
            try:
                done[reader] = _reduce(reader, inputs[0].flatten(0, -2), part.groups, cut)
            except MopError as error:
                raise type(error)(f"{part.name}: {error}") from error
        return (inputs[0][..., done[reader].kept], *inputs[1:])

    with forward_hooks(parts, arrive, pre=True):
        yield done


def _reduce(reader: Linear, inputs: Float[Tensor, "tokens in"], groups: int, cut: GroupPruning) -> ReducedInput:
    """Narrow the matrix in place; its bias, if it has one, takes over the mean of what goes."""
    start = time.perf_counter()
    weight, bias = weight_of(reader), reader.bias
    seen = InputGram()
    seen.update(inputs if bias is None else inputs - inputs.mean(0))
    gram = seen.mean()
    solved = prune_input_groups(weight, gram, groups=groups, remove=cut.remove, score=cut.score, damping=cut.damping)
    lost = weight.clone()
    lost[:, solved.kept] -= solved.weight
    size = float((weight @ gram * weight).sum())
    error = float((lost @ gram * lost).sum()) / size if size > 0 else 0.0
    set_weight(reader, solved.weight, None if bias is None else bias + lost @ inputs.mean(0))
    return ReducedInput(solved.kept, error, solved.escalations, time.perf_counter() - start)


def _check_same(
    model: LanguageModel, tokens: Int[Tensor, "samples time"], hidden: Float[Tensor, "samples time hidden"]
) -> None:
    """The narrowed network, run as a whole, must give what the blocks gave while they were narrowed."""
    found = model.network.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    apart = float((found - hidden).norm() / hidden.norm())
    if not apart <= _SAME:
        raise DataError(
            f"narrowed, {type(model.network).__name__} computes something else ({apart:.2g} apart): this family uses "
            "its heads or channels in another way than is known here; leave head_sparsity or mlp_sparsity at 0"
        )
