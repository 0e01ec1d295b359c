"""SparseGPT: one-shot pruning with error feedback (Frantar & Alistarh, https://arxiv.org/abs/2301.00774, algorithm 1).

The mask of a block removes the lowest w² / [H⁻¹]jj, with the inverse for columns j and later. Difference from the
released code: counts are exact. The released code removes one weight too many per block, and more when scores tie.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.masks import check_pattern, groups_of_rows, lowest_count, n_of_m, sparsity_per_matrix
from mopcompress.algorithms.obs import LossFn, inverse_factor, sweep
from mopcompress.algorithms.solution import Solution

ChooseMask = Callable[[int, Tensor], Tensor]
"""(index of a panel's first column, updated panel [columns, rows]) -> mask of the weights to remove."""


def sparsegpt(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    sparsity: float | Sequence[float],
    pattern: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    keep_zeros: bool = False,
    row_groups: Sequence[int] | None = None,
) -> Solution:
    """Zero exactly `round(sparsity * weights)` weights; the later columns compensate for each of them.

    The mask is chosen for `block_size` columns at a time; with `pattern` (n, m) for m columns, n in each row. Counts of
    blocks are rounded cumulatively, so that the total is exact. Weights of inputs that never fire go first.
    `keep_zeros` preserves existing zeros, which count towards the sparsity. `row_groups` are the row counts of matrices
    stacked in `weight` because they share their inputs: each gets its own mask with its own exact count, and `sparsity`
    may be one number per matrix. Raises `DataError` when a pattern does not fit.
    """
    factor = inverse_factor(gram.to(weight), damping=damping)
    salience = factor.upper.diagonal().masked_fill(gram.diagonal() == 0, torch.inf)
    choose_mask = mask_chooser(
        weight,
        salience,
        sparsity=sparsity,
        pattern=pattern,
        block_size=block_size,
        keep_zeros=keep_zeros,
        row_groups=row_groups,
    )

    def solve_panel(first: int, panel: Tensor) -> LossFn:
        removed = choose_mask(first, panel).to(panel).unbind()

        def write_loss(index: int, column: Tensor, error: Tensor) -> None:
            torch.mul(column, removed[index - first], out=error)

        return write_loss

    panel_columns = pattern[1] if pattern else block_size
    return Solution(sweep(weight, factor, solve_panel, panel_columns=panel_columns), factor.escalations)


def mask_chooser(
    weight: Float[Tensor, "out in"],
    salience: Float[Tensor, " in"],
    *,
    sparsity: float | Sequence[float],
    pattern: tuple[int, int] | None,
    block_size: int,
    keep_zeros: bool,
    row_groups: Sequence[int] | None = None,
) -> ChooseMask:
    """Return a function that marks the lowest (w / salience)² of a panel, for a sweep to call with updated weights.

    `salience` is the diagonal of the inverse factor. Raises `DataError` when a pattern does not fit.
    """
    check_pattern(sparsity, pattern)
    if pattern:
        n_of_m(weight[:1], *pattern)  # raises for a shape that does not fit, before any work
    groups = groups_of_rows(weight, row_groups)
    zeros = weight.T == 0 if keep_zeros else None
    quotas = []
    if not pattern:
        sparsities = sparsity_per_matrix(sparsity, groups)
        quotas = [
            _block_quotas(weight[rows], number, block_size, keep_zeros)
            for rows, number in zip(groups, sparsities, strict=True)
        ]

    def choose_mask(first: int, panel: Tensor) -> Tensor:
        columns = slice(first, first + len(panel))
        scores = (panel / salience[columns, None]).square_()
        if zeros is not None:
            scores.masked_fill_(zeros[columns], -1.0)  # first to go
        if pattern:
            mask = n_of_m(scores.T, *pattern).T
        else:
            counts = [quota[first // block_size] for quota in quotas]
            mask = torch.cat([lowest_count(scores[:, rows], n) for rows, n in zip(groups, counts, strict=True)], 1)
        return mask if zeros is None else mask | zeros[columns]  # there may be more zeros than the pattern requires

    return choose_mask


def _block_quotas(weight: Float[Tensor, "out in"], sparsity: float, block_size: int, keep_zeros: bool) -> list[int]:
    """Count the weights that each block of columns loses: its preserved zeros, and a proportional part of the rest."""
    blocks = torch.split(weight, block_size, dim=1)
    zeros = [int((block == 0).sum()) if keep_zeros else 0 for block in blocks]
    others = [block.numel() - count for block, count in zip(blocks, zeros, strict=True)]
    to_remove = max(0, round(sparsity * weight.numel()) - sum(zeros))
    cumulative = [round(to_remove * sum(others[:end]) / max(1, sum(others))) for end in range(len(others) + 1)]
    return [count + cumulative[index + 1] - cumulative[index] for index, count in enumerate(zeros)]
