"""GPTQ: rounding to a grid with error feedback (Frantar et al., https://arxiv.org/abs/2210.17323).

The grid is symmetric: codes from -2^(bits-1) to 2^(bits-1) - 1 times a scale, so that it contains zero exactly.
Differences from the released code: a scale minimises the squared error weighted by the mean square of each input (there
all inputs count alike, with exponent 2.4), and scales are numbers that fp16 can hold.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.obs import InverseFactor, LossFn, inverse_factor, sweep
from mopcompress.algorithms.solution import QuantizedWeight
from mopcompress.algorithms.sparsegpt import ChooseMask, removals
from mopcompress.errors import DataError

_SHRINKS = [1 - 0.05 * step for step in range(15)]  # of the scale that just reaches the largest weight
_SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16


def gptq(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group_size: int | None,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    keep_zeros: bool = False,
    sparsity: float = 0.0,
    pattern: tuple[int, int] | None = None,
) -> QuantizedWeight:
    """Round every weight to a grid with one scale per row and `group_size` consecutive inputs (None: all of them).

    The scales of a group are chosen when the sweep reaches it, from the weights as they are then. With `act_order` the
    inputs with the largest mean square go first, and all scales are chosen beforehand from the given weights ("static
    groups"), so that groups stay consecutive. `keep_zeros` keeps zeros at zero; weights of inputs that never fire
    become zero. `block_size` only decides how updates are batched.

    With `sparsity` (and `pattern`) weights are removed, as SparseGPT does, in the same sweep: a panel of `group_size`
    inputs loses its share when it is reached, and its scales serve what is left. Raises `DataError` when groups do not
    fit, or when weights are to be removed in the order of `act_order`: every panel's share would be the wrong one.
    """
    size = weight.shape[1]
    group_size = size if group_size is None else group_size
    _check_grid(size, bits, group_size)
    gram, importance = gram.to(weight), gram.diagonal().to(weight)
    weight = weight.detach().masked_fill(importance == 0, 0.0)
    scales = weight.new_empty(size // group_size, len(weight))
    order = torch.arange(size, device=weight.device)
    if act_order:
        scales = _initial_scales(weight, importance, bits, group_size)
        order = importance.argsort(descending=True, stable=True)
        weight, gram = weight[:, order], gram[order][:, order]
    factor = inverse_factor(gram, damping=damping)
    group_of = (order // group_size).tolist()
    choose = _removals(weight, factor, act_order, group_size, keep_zeros, sparsity, pattern)

    def settle(first: int, panel: Tensor) -> LossFn:
        removed = choose(first, panel)
        if not act_order:
            here = slice(first, first + group_size)
            scales[first // group_size] = _best_scales(panel.masked_fill(removed, 0.0), importance[here], bits)

        def reject(index: int, column: Tensor, error: Tensor) -> None:
            scale = scales[group_of[index]]
            rounded = _codes(column, scale, bits).mul_(scale).masked_fill_(removed[index - first], 0.0)
            torch.sub(column, rounded, out=error)

        return reject

    panel_columns = block_size if act_order else group_size
    settled = sweep(weight, factor, settle, panel_columns=panel_columns, block_columns=block_size)
    if act_order:
        settled = settled[:, order.argsort()]
    return _on_grid(settled, scales.T.contiguous(), factor.escalations)


def _removals(
    weight: Tensor,
    factor: InverseFactor,
    act_order: bool,
    group_size: int,
    keep_zeros: bool,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> ChooseMask:
    """Which weights of a panel become zero, whatever the grid."""
    if not sparsity:
        zeros = (weight.T == 0) & keep_zeros
        return lambda first, panel: zeros[first : first + len(panel)]
    if act_order:
        raise DataError("weights cannot be removed in the order of act_order; use one of them, or prune before")
    salience = factor.upper.diagonal()
    return removals(weight, salience, sparsity=sparsity, pattern=pattern, block_size=group_size, keep_zeros=keep_zeros)


def _on_grid(
    settled: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"], escalations: int
) -> QuantizedWeight:
    """Take the float residue off weights that are integers times their scale, up to that residue."""
    spread = scales.repeat_interleave(settled.shape[1] // scales.shape[1], dim=1)
    codes = (settled / spread).round().to(torch.int8)  # an integer has one zero: no weight becomes -0.0
    return QuantizedWeight(codes * spread, escalations, codes=codes, scales=scales)


def _codes(column: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (column / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _best_scales(
    panel: Float[Tensor, "columns rows"], importance: Float[Tensor, " columns"], bits: int
) -> Float[Tensor, " rows"]:
    """The scale of each row with the least importance-weighted squared rounding error, among 15 shrunken ones."""
    widest = panel.abs().amax(0) / (2 ** (bits - 1) - 0.5)
    best, least = torch.empty_like(widest), torch.full_like(widest, torch.inf)
    for shrink in _SHRINKS:
        scale = (shrink * widest).half().clamp_min(_SMALLEST_SCALE).to(widest)
        loss = importance @ (_codes(panel, scale, bits).mul_(scale) - panel).square_()
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best


def _initial_scales(
    weight: Float[Tensor, "out in"], importance: Float[Tensor, " in"], bits: int, group_size: int
) -> Float[Tensor, "groups out"]:
    panels = zip(torch.split(weight.T, group_size), torch.split(importance, group_size), strict=True)
    return torch.stack([_best_scales(panel, share, bits) for panel, share in panels])


def _check_grid(size: int, bits: int, group_size: int) -> None:
    if not 2 <= bits <= 8:
        raise DataError(f"cannot quantise to {bits} bits; choose 2 to 8")
    if group_size < 1 or size % group_size:
        fitting = [str(candidate) for candidate in (32, 64, 128) if size % candidate == 0]
        advice = f"choose group_size {' or '.join(fitting)}" if fitting else "leave this layer out with `ignore`"
        raise DataError(f"{size} inputs cannot be cut into groups of {group_size}; {advice}")
