"""GPTQ: rounding to a grid with error feedback (Frantar et al., https://arxiv.org/abs/2210.17323, algorithm 1).

The grid is symmetric: codes from -2^(bits-1) to 2^(bits-1) - 1 times a scale, so that it contains zero exactly.
Differences from the released code: a scale minimises the squared error weighted by the mean square of each input,
instead of the error to the power 2.4 with equal weights. Scales are numbers that fp16 can hold.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.obs import InverseFactor, LossFn, inverse_factor, sweep
from mopcompress.algorithms.solution import QuantizedWeight
from mopcompress.algorithms.sparsegpt import ChooseMask, mask_chooser
from mopcompress.errors import DataError

_SHRINKS = [1 - 0.05 * step for step in range(15)]  # factors on the scale that just reaches the largest weight
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

    The scales of a group are chosen when the sweep reaches it, from the updated weights. With `act_order` the sweep
    takes the inputs with the largest mean square first. All scales are then chosen beforehand from the given weights
    ("static groups"), so that groups stay consecutive. `keep_zeros` preserves zeros; weights of inputs that never fire
    become zero. `block_size` only decides how updates are batched.

    With `sparsity` (and `pattern`) the same sweep prunes as SparseGPT does: each panel of `group_size` inputs loses its
    quota when the sweep reaches it, and its scales fit the remaining weights. Raises `DataError` when groups do not
    fit, and for `sparsity` with `act_order`: the quotas are per panel in the given order of inputs.
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
    choose_mask = _mask_chooser(weight, factor, act_order, group_size, keep_zeros, sparsity, pattern)

    def solve_panel(first: int, panel: Tensor) -> LossFn:
        removed = choose_mask(first, panel)
        if not act_order:
            group = slice(first, first + group_size)
            scales[first // group_size] = _best_scales(panel.masked_fill(removed, 0.0), importance[group], bits)

        def write_loss(index: int, column: Tensor, error: Tensor) -> None:
            scale = scales[group_of[index]]
            rounded = _codes(column, scale, bits).mul_(scale).masked_fill_(removed[index - first], 0.0)
            torch.sub(column, rounded, out=error)

        return write_loss

    panel_columns = block_size if act_order else group_size
    rounded = sweep(weight, factor, solve_panel, panel_columns=panel_columns, block_columns=block_size)
    if act_order:
        rounded = rounded[:, order.argsort()]
    return _snap_to_grid(rounded, scales.T.contiguous(), factor.escalations)


def _mask_chooser(
    weight: Tensor,
    factor: InverseFactor,
    act_order: bool,
    group_size: int,
    keep_zeros: bool,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> ChooseMask:
    """Return a function that marks the weights of a panel that become zero, whatever the grid."""
    if not sparsity:
        zeros = (weight.T == 0) & keep_zeros
        return lambda first, panel: zeros[first : first + len(panel)]
    if act_order:
        raise DataError("weights cannot be removed in the order of act_order; use one of them, or prune before")
    return mask_chooser(
        weight,
        factor.upper.diagonal(),
        sparsity=sparsity,
        pattern=pattern,
        block_size=group_size,
        keep_zeros=keep_zeros,
    )


def _snap_to_grid(
    rounded: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"], escalations: int
) -> QuantizedWeight:
    """Remove the float residue from weights that are integers times their scale up to that residue."""
    scale_per_weight = scales.repeat_interleave(rounded.shape[1] // scales.shape[1], dim=1)
    codes = (rounded / scale_per_weight).round().to(torch.int8)  # an integer has a single zero: no weight is -0.0
    return QuantizedWeight(codes * scale_per_weight, escalations, codes=codes, scales=scales)


def _codes(column: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (column / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _best_scales(
    panel: Float[Tensor, "columns rows"], importance: Float[Tensor, " columns"], bits: int
) -> Float[Tensor, " rows"]:
    """Return the scale per row with the least importance-weighted squared rounding error, of 15 shrunken ones."""
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
    return torch.stack([_best_scales(panel, panel_importance, bits) for panel, panel_importance in panels])


def _check_grid(size: int, bits: int, group_size: int) -> None:
    if not 2 <= bits <= 8:
        raise DataError(f"cannot quantise to {bits} bits; choose 2 to 8")
    if group_size < 1 or size % group_size:
        fitting = [str(candidate) for candidate in (32, 64, 128) if size % candidate == 0]
        advice = f"choose group_size {' or '.join(fitting)}" if fitting else "leave this layer out with `ignore`"
        raise DataError(f"{size} inputs cannot be cut into groups of {group_size}; {advice}")
