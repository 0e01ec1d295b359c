"""Compress a model block by block, in one pass of the calibration tokens.

All calibration tokens enter a block together, and every linear is compressed *when its input arrives*, before it gives
an output. So each linear is calibrated on the compressed ones before it, inside the block too (true-sequential), and
every sub-layer is computed exactly once. SparseGPT's released code and llm-compressor run every block twice, and
calibrate all linears of a block on that block's dense weights. Several compressions of a linear, such as pruning and
then rounding, follow each other on the same statistic: a whole recipe is one pass.

Only when a compression asks to match the dense model (see `matching`) do the dense hidden states walk along, and every
block is run twice: dense, where the inputs of its linears are noted, then compressed.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.algorithms.dense_targets import DenseActivations
from mopcompress.algorithms.solution import LowRankFactors, QuantizedWeight, Solution
from mopcompress.compress.dense_pass import dense_activations, on_input, record_inputs
from mopcompress.compress.plan import MethodConfig, PlannedMethod, apply_methods, assign_targets
from mopcompress.errors import MopError, NumericalError
from mopcompress.models.experts import Unstacked, expert_by_expert, named_linears, unstacked
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, weight_of
from mopcompress.models.repair import attach_repairs, temporary_repair

Names = dict[Linear, str]


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """What was done to one linear, counted afterwards."""

    name: str
    block: int
    blocks: int
    methods: Sequence[str]  # in the order in which they were applied; none when no calibration token reached an expert
    weights: int
    zeros: int
    escalations: int  # how often the damping had to be raised; 0 when the Gram matrix was well-conditioned
    seconds: float
    repair_rank: int = 0  # of the low-rank matrix beside it, which has so many parameters:
    repair_parameters: int = 0


@dataclass(frozen=True)
class BlockInputs:
    """What enters a block: from the compressed blocks below, and from the dense ones for the samples to be matched."""

    compressed: Float[Tensor, "samples time hidden"] | None = None  # None: nothing ran yet
    dense: Float[Tensor, "some_samples time hidden"] | None = None


@dataclass(frozen=True)
class CompressedBlock:
    """What came of compressing a block, besides its weights."""

    outputs: BlockInputs
    rows: list[LayerRow]
    scales: dict[str, Float[Tensor, "_ _"]]  # [out, groups] of every linear that ended on a grid
    repairs: dict[str, LowRankFactors] = field(
        default_factory=dict
    )  # of those that have one, in the dtype of the weights


def compress_model(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    compressions: Sequence[MethodConfig],
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[LayerRow], None] = lambda row: None,
) -> list[LayerRow]:
    """Compress the linears of all decoder blocks in place, and put repairs beside; embeddings and head stay.

    With a `dtype`, every block runs on with weights rounded to it, as they will be when they are stored and read again.

    Raises `DataError` when a target means no linear, `NumericalError` naming the layer when its calibration is beyond
    repair.
    """
    steps = plan_methods(model, compressions)
    rows: list[LayerRow] = []
    hidden = BlockInputs()
    for index in range(len(model.blocks)):
        block = compress_block(model, tokens, hidden, index, steps, dtype=dtype)
        hidden = block.outputs
        attach_repairs(model, block.repairs)
        for row in block.rows:
            rows.append(row)
            progress(row)
    return rows


def plan_methods(model: LanguageModel, compressions: Sequence[MethodConfig]) -> list[PlannedMethod]:
    """Which linears each compression goes to. Raises `DataError` when a target means no linear of the blocks."""
    names = [name for index in range(len(model.blocks)) for name in linears_of(model, index).values()]
    return assign_targets(compressions, names)


def linears_of(model: LanguageModel, index: int) -> Names:
    """The linears of a block, with their dotted names. Raises `DataError` for weights that are stacked unknown-how."""
    return _named(model, index, unstacked(model.blocks[index]))


def _named(model: LanguageModel, index: int, experts: Unstacked) -> Names:
    return named_linears(model.blocks[index], experts, f"{model.blocks_prefix()}.{index}")


@torch.inference_mode()
def compress_block(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    hidden: BlockInputs,
    index: int,
    steps: Sequence[PlannedMethod],
    *,
    dtype: torch.dtype | None,
) -> CompressedBlock:
    """Compress block `index` in place. An expert that no token reaches stays as it is, and its rows say so.

    Repairs act while the tokens go through, so that later linears are calibrated with them, and are given back.

    With a `dtype`, it runs on with weights rounded to it, as they will be when they are stored and read again.
    """
    experts = unstacked(model.blocks[index])
    names = {
        linear: name
        for linear, name in _named(model, index, experts).items()
        if any(name in step.target_index for step in steps)
    }
    entering, dense = hidden.compressed, hidden.dense
    with expert_by_expert(experts), record_inputs(names) as first_inputs:
        model.run_block(tokens[:1, :1], None if entering is None else entering[:1, :1], index)
    alone = [[linear] for linear in names if linear not in first_inputs]  # such as experts of another token
    groups = [*_sharing(first_inputs), *alone]
    sides: dict[Linear, DenseActivations] = {}
    samples = max((step.compression.dense_samples(len(tokens)) for step in steps), default=0)
    if samples:
        matched = [group for group in groups if any(_is_matched(names[one], steps) for one in group)]
        with expert_by_expert(experts):
            dense, sides = dense_activations(model, tokens[:samples], dense, index, matched)
    arriving = compress_on_input(names, groups, sides, steps, tokens=tokens.numel(), dtype=dtype)
    with expert_by_expert(experts), arriving as settled:
        entering = model.run_block(tokens, entering, index)
    reached = {linear for linear, _, _ in settled}
    idle = [linear for linear in names if linear not in reached]
    routed = {linear for _, every in experts.values() for expert in every for linear in vars(expert).values()}
    lost = next((names[linear] for linear in idle if linear not in routed), None)
    if lost:
        raise NumericalError(f"{lost}: no calibration token reached it; use other text")
    rows = [
        _row(names[linear], index, len(model.blocks), steps, linear, solved, seconds)
        for linear, solved, seconds in settled
    ]
    rows += [_row(names[one], index, len(model.blocks), (), one, Solution(weight_of(one)), 0.0) for one in idle]
    scales = {names[linear]: solved.scales for linear, solved, _ in settled if isinstance(solved, QuantizedWeight)}
    repairs = {names[linear]: solved.repair for linear, solved, _ in settled if solved.repair}
    kept = {name: repair if dtype is None else repair.rounded(dtype) for name, repair in repairs.items()}
    return CompressedBlock(BlockInputs(entering, dense), rows, scales, kept)


SolvedLinears = list[tuple[Linear, Solution, float]]


@contextmanager
def compress_on_input(
    names: Names,
    groups: Sequence[Sequence[Linear]],
    sides: dict[Linear, DenseActivations],
    steps: Sequence[PlannedMethod],
    *,
    tokens: int,
    dtype: torch.dtype | None,
) -> Iterator[SolvedLinears]:
    """Inside the block, the linears of a group are compressed when the input that they share arrives at the first.

    `sides` has what the dense model had there under a group's first linear, and is emptied on the way; it is of no use
    to a group that fewer than all `tokens` reach, for tokens are paired by position.
    """
    waiting = {linear: group for group in groups for linear in group}
    settled: SolvedLinears = []

    def arrive(linear: Linear, inputs: Tensor) -> None:
        group = waiting.get(linear)
        if group is None:
            return
        start = time.perf_counter()
        flat, side = inputs.flatten(0, -2), sides.pop(group[0], None)
        weights = {names[one]: weight_of(one) for one in group}
        try:
            solutions = apply_methods(weights, flat, side if len(flat) == tokens else None, steps)
        except MopError as error:
            raise type(error)(f"{names[linear]}: {error}") from error
        seconds = (time.perf_counter() - start) / len(group)
        for one in group:
            solved = solutions[names[one]]
            weight_of(one).copy_(solved.weight if dtype is None else solved.weight.to(dtype))
            if solved.repair:
                rounded = solved.repair if dtype is None else solved.repair.rounded(dtype).rounded(one.weight.dtype)
                repaired.enter_context(temporary_repair(one, rounded))  # acts on the call that has just begun, too
            settled.append((one, solved, seconds))
            del waiting[one]

    with ExitStack() as repaired, on_input(waiting, arrive):
        yield settled


def _sharing(inputs: Mapping[Linear, Tensor]) -> list[list[Linear]]:
    """Linears that were given the very same tensor, such as q, k and v: one Gram matrix and one sweep serve them."""
    groups: dict[int, list[Linear]] = {}
    for linear, value in inputs.items():
        groups.setdefault(id(value), []).append(linear)
    return list(groups.values())


def _is_matched(name: str, steps: Sequence[PlannedMethod]) -> bool:
    return any(step.compression.match_dense and name in step.target_index for step in steps)


def _row(
    name: str,
    block: int,
    blocks: int,
    steps: Sequence[PlannedMethod],
    linear: Linear,
    solved: Solution,
    seconds: float,
) -> LayerRow:
    return LayerRow(
        name=name,
        block=block,
        blocks=blocks,
        methods=[step.compression.method for step in steps if name in step.target_index],
        weights=linear.weight.numel(),
        zeros=int((linear.weight == 0).sum()),
        escalations=solved.escalations,
        seconds=seconds,
        repair_rank=solved.repair.rank if solved.repair else 0,
        repair_parameters=solved.repair.parameters_stored if solved.repair else 0,
    )
