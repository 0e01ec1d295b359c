"""Sequential compression of a model: block by block, in one pass of the calibration tokens.

All calibration tokens enter a block together, and every linear is compressed *when its input arrives*, before it
computes an output. So each linear is calibrated on the compressed ones before it, inside the block too
(true-sequential), and every sub-layer runs exactly once. SparseGPT's released code and llm-compressor run every block
twice, and calibrate all linears of a block on that block's dense weights. Several methods for one linear, such as
pruning and then rounding, use the same statistic one after the other: a whole recipe is one pass.

When a method asks to match the dense model (see `algorithms/dense_targets.py`), the dense hidden states are carried
along, and every block runs twice: dense, which records the targets of its linears, then compressed.
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
from mopcompress.models.experts import StackedExperts, expert_by_expert, named_linears, unstack_experts
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, weight_of
from mopcompress.models.repair import attach_repairs, temporary_repair

Names = dict[Linear, str]


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """The compression of one linear; weights and zeros are counted afterwards."""

    name: str
    block: int
    blocks: int
    methods: Sequence[str]  # in the order of application; none for an expert that no calibration token reached
    weights: int
    zeros: int
    escalations: int  # how often damping increased; 0 when the Gram matrix was well-conditioned
    seconds: float
    repair_rank: int = 0  # of its low-rank repair
    repair_parameters: int = 0  # of its low-rank repair


@dataclass(frozen=True)
class BlockInputs:
    """The hidden states that enter a block, from the compressed blocks below, and from the dense ones for matching."""

    compressed: Float[Tensor, "samples time hidden"] | None = None  # None before the first block
    dense: Float[Tensor, "some_samples time hidden"] | None = None


@dataclass(frozen=True)
class CompressedBlock:
    """The results of compressing a block, besides its weights."""

    outputs: BlockInputs
    rows: list[LayerRow]
    scales: dict[str, Float[Tensor, "_ _"]]  # [out, groups] of every linear with a weight on a grid
    repairs: dict[str, LowRankFactors] = field(default_factory=dict)  # of repaired linears, in the weights' dtype


@dataclass(frozen=True)
class SolvedLinear:
    """A linear with its solution, and its part of the time that its group took."""

    linear: Linear
    solution: Solution
    seconds: float


def compress_model(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    configs: Sequence[MethodConfig],
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[LayerRow], None] = lambda row: None,
) -> list[LayerRow]:
    """Compress the linears of all decoder blocks in place and attach their repairs; embeddings and head stay.

    Args:
        model: The dense model; its weights change.
        tokens: Calibration samples of one length.
        configs: The methods, in the order of their application.
        dtype: The dtype in which weights will be stored; later linears are calibrated with weights rounded to it.
            None: weights are not rounded.
        progress: Receives the row of each linear after its block is done.

    Returns:
        One row per compressed linear, in the order of compression.

    Raises:
        DataError: A target matches no linear, or options do not fit a linear.
        NumericalError: A linear's calibration cannot be used; the message names the linear.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> from mopcompress import compress_model, load_model
        >>> from mopcompress.compress.plan import MethodConfig
        >>> model = load_model(Path("runs/model"), device=torch.device("cpu"))
        >>> tokens = torch.randint(5, 60, (4, 16))  # better: windows of text, by `text_windows`
        >>> prune = MethodConfig(method="sparsegpt", options={"sparsity": 0.5})
        >>> rows = compress_model(model, tokens, [prune])
        >>> rows[0].zeros / rows[0].weights
        0.5
    """
    methods = plan_methods(model, configs)
    rows: list[LayerRow] = []
    hidden = BlockInputs()
    for index in range(len(model.blocks)):
        block = compress_block(model, tokens, hidden, index, methods, dtype=dtype)
        hidden = block.outputs
        attach_repairs(model, block.repairs)
        for row in block.rows:
            rows.append(row)
            progress(row)
    return rows


def plan_methods(model: LanguageModel, configs: Sequence[MethodConfig]) -> list[PlannedMethod]:
    """Assign each method to linears of the blocks. Raises `DataError` when a target matches none of them."""
    names = [name for index in range(len(model.blocks)) for name in linears_of(model, index).values()]
    return assign_targets(configs, names)


def linears_of(model: LanguageModel, index: int) -> Names:
    """Return the linears of a block with their dotted names. Raises `DataError` for an unknown stack of experts."""
    return _named(model, index, unstack_experts(model.blocks[index]))


def _named(model: LanguageModel, index: int, experts: StackedExperts) -> Names:
    return named_linears(model.blocks[index], experts, f"{model.blocks_prefix()}.{index}")


@torch.inference_mode()
def compress_block(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    hidden: BlockInputs,
    index: int,
    methods: Sequence[PlannedMethod],
    *,
    dtype: torch.dtype | None,
) -> CompressedBlock:
    """Compress block `index` in place, with `hidden` from the blocks below.

    Repairs act while the tokens run through the block, so that later linears are calibrated with them; they are
    returned, not attached. With a `dtype`, later linears are calibrated with weights rounded to it, as they are when
    they are stored and read again.

    An expert that no token reaches stays as it is, and its row has no methods. Raises `NumericalError` naming any other
    linear that no token reaches.
    """
    experts = unstack_experts(model.blocks[index])
    names = {
        linear: name
        for linear, name in _named(model, index, experts).items()
        if any(name in method.target_index for method in methods)
    }
    entering, dense = hidden.compressed, hidden.dense
    with expert_by_expert(experts), record_inputs(names) as first_inputs:
        model.run_block(tokens[:1, :1], None if entering is None else entering[:1, :1], index)
    unshared = [[linear] for linear in names if linear not in first_inputs]  # such as experts of another token
    groups = [*_group_by_input(first_inputs), *unshared]
    activations: dict[Linear, DenseActivations] = {}
    samples = max((method.config.dense_samples(len(tokens)) for method in methods), default=0)
    if samples:
        matched = [group for group in groups if any(_is_matched(names[linear], methods) for linear in group)]
        with expert_by_expert(experts):
            dense, activations = dense_activations(model, tokens[:samples], dense, index, matched)
    compressing = compress_on_input(names, groups, activations, methods, tokens=tokens.numel(), dtype=dtype)
    with expert_by_expert(experts), compressing as solved:
        entering = model.run_block(tokens, entering, index)
    reached = {result.linear for result in solved}
    unreached = [linear for linear in names if linear not in reached]
    routed = {linear for _, stack in experts.values() for expert in stack for linear in vars(expert).values()}
    missed = next((names[linear] for linear in unreached if linear not in routed), None)
    if missed:
        raise NumericalError(f"{missed}: no calibration token reached it; use other text")
    untouched = [SolvedLinear(linear, Solution(weight_of(linear)), 0.0) for linear in unreached]
    rows = [_row(names[result.linear], index, len(model.blocks), methods, result) for result in solved]
    rows += [_row(names[result.linear], index, len(model.blocks), (), result) for result in untouched]
    solutions = {names[result.linear]: result.solution for result in solved}
    scales = {name: solution.scales for name, solution in solutions.items() if isinstance(solution, QuantizedWeight)}
    repairs = {name: solution.repair for name, solution in solutions.items() if solution.repair}
    if dtype is not None:
        repairs = {name: repair.rounded(dtype) for name, repair in repairs.items()}
    return CompressedBlock(BlockInputs(entering, dense), rows, scales, repairs)


@contextmanager
def compress_on_input(
    names: Names,
    groups: Sequence[Sequence[Linear]],
    activations: dict[Linear, DenseActivations],
    methods: Sequence[PlannedMethod],
    *,
    tokens: int,
    dtype: torch.dtype | None,
) -> Iterator[list[SolvedLinear]]:
    """Compress each group of linears when its shared input reaches the first of them, inside the `with` block.

    `activations` holds the dense model's activations under a group's first linear; they are removed after their use, to
    free memory. A group that fewer than all `tokens` reach does not use them, because tokens are paired by position.
    """
    waiting = {linear: group for group in groups for linear in group}
    solved: list[SolvedLinear] = []

    def compress_group(reached: Linear, inputs: Tensor) -> None:
        group = waiting.get(reached)
        if group is None:
            return
        start = time.perf_counter()
        flat, dense = inputs.flatten(0, -2), activations.pop(group[0], None)
        weights = {names[linear]: weight_of(linear) for linear in group}
        try:
            solutions = apply_methods(weights, flat, dense if len(flat) == tokens else None, methods)
        except MopError as error:
            raise type(error)(f"{names[reached]}: {error}") from error
        seconds = (time.perf_counter() - start) / len(group)
        for linear in group:
            solution = solutions[names[linear]]
            weight_of(linear).copy_(solution.weight if dtype is None else solution.weight.to(dtype))
            if solution.repair:
                rounded = solution.repair
                if dtype is not None:
                    rounded = rounded.rounded(dtype).rounded(linear.weight.dtype)
                repairs.enter_context(temporary_repair(linear, rounded))  # acts on the running call, too
            solved.append(SolvedLinear(linear, solution, seconds))
            del waiting[linear]

    with ExitStack() as repairs, on_input(waiting, compress_group):
        yield solved


def _group_by_input(inputs: Mapping[Linear, Tensor]) -> list[list[Linear]]:
    """Group linears with the very same input tensor, such as q, k and v: they share a Gram matrix and a sweep."""
    groups: dict[int, list[Linear]] = {}
    for linear, value in inputs.items():
        groups.setdefault(id(value), []).append(linear)
    return list(groups.values())


def _is_matched(name: str, methods: Sequence[PlannedMethod]) -> bool:
    return any(method.config.match_dense and name in method.target_index for method in methods)


def _row(name: str, block: int, blocks: int, methods: Sequence[PlannedMethod], solved: SolvedLinear) -> LayerRow:
    weight, repair = solved.linear.weight, solved.solution.repair
    return LayerRow(
        name=name,
        block=block,
        blocks=blocks,
        methods=[method.config.method for method in methods if name in method.target_index],
        weights=weight.numel(),
        zeros=int((weight == 0).sum()),
        escalations=solved.solution.escalations,
        seconds=solved.seconds,
        repair_rank=repair.rank if repair else 0,
        repair_parameters=repair.parameters_stored if repair else 0,
    )
