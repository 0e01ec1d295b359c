"""SparseGPT: one-shot pruning with error feedback (Frantar & Alistarh, https://arxiv.org/abs/2301.00774).

Difference from the released code: counts are exact. There, every block loses one weight more, and more still when
scores tie. The mask of a block is taken from w² / [H⁻¹]jj as in algorithm 1, with the inverse for columns j and later.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.masks import check_pattern, groups_of_rows, lowest_count, n_of_m, split_count
from mopcompress.algorithms.obs import LossFn, inverse_factor, sweep
from mopcompress.algorithms.solution import Solution

ChooseMask = Callable[[int, Tensor], Tensor]
"""(index of a panel's first column, panel [columns, rows] up to date) -> which of its weights go."""


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
    """Zero exactly `round(sparsity * weights)` weights and let the later columns make up for each.

    The mask is chosen for `block_size` columns at a time; with `pattern` (n, m) for m columns, n in each row. The share
    of every block is rounded cumulatively, so that the whole is exact. Inputs that never fire go first. `keep_zeros`
    keeps the zeros that are there; they count. `row_groups` are the row counts of matrices stacked in `weight` because
    they share their inputs: each gets its own mask with its own exact count; `sparsity` may then be one share a matrix.
    """
    factor = inverse_factor(gram.to(weight), damping=damping)
    salience = factor.upper.diagonal().masked_fill(gram.diagonal() == 0, torch.inf)
    choose = removals(
        weight,
        salience,
        sparsity=sparsity,
        pattern=pattern,
        block_size=block_size,
        keep_zeros=keep_zeros,
        row_groups=row_groups,
    )

    def settle(first: int, panel: Tensor) -> LossFn:
        removed = choose(first, panel).to(panel).unbind()

        def reject(index: int, column: Tensor, error: Tensor) -> None:
            torch.mul(column, removed[index - first], out=error)

        return reject

    panel_columns = pattern[1] if pattern else block_size
    return Solution(sweep(weight, factor, settle, panel_columns=panel_columns), factor.escalations)


def removals(
    weight: Float[Tensor, "out in"],
    salience: Float[Tensor, " in"],
    *,
    sparsity: float | Sequence[float],
    pattern: tuple[int, int] | None,
    block_size: int,
    keep_zeros: bool,
    row_groups: Sequence[int] | None = None,
) -> ChooseMask:
    """How a sweep chooses what goes: the lowest (w / salience)² of each panel, as the weights are when it is reached.

    `salience` is the diagonal of the inverse factor. Raises `DataError` when a pattern does not fit.
    """
    check_pattern(sparsity, pattern)
    if pattern:
        n_of_m(weight[:1], *pattern)  # a wrong shape is reported before any work
    groups = groups_of_rows(weight, row_groups)
    zeros = weight.T == 0 if keep_zeros else None
    quotas = []
    if not pattern:
        shares = split_count(sparsity, groups)
        quotas = [_quotas(weight[g], share, block_size, keep_zeros) for g, share in zip(groups, shares, strict=True)]

    def choose(first: int, panel: Tensor) -> Tensor:
        here = slice(first, first + len(panel))
        scores = (panel / salience[here, None]).square_()
        if zeros is not None:
            scores.masked_fill_(zeros[here], -1.0)  # first to go
        if pattern:
            mask = n_of_m(scores.T, *pattern).T
        else:
            counts = [quota[first // block_size] for quota in quotas]
            mask = torch.cat([lowest_count(scores[:, g], n) for g, n in zip(groups, counts, strict=True)], 1)
        return mask if zeros is None else mask | zeros[here]  # there may be more zeros than the pattern asks for

    return choose


def _quotas(weight: Float[Tensor, "out in"], sparsity: float, block_size: int, keep_zeros: bool) -> list[int]:
    """How many weights each block of columns loses: kept zeros, and a proportional share of what is still to go."""
    blocks = torch.split(weight, block_size, dim=1)
    zeros = [int((block == 0).sum()) if keep_zeros else 0 for block in blocks]
    others = [block.numel() - kept for block, kept in zip(blocks, zeros, strict=True)]
    to_go = max(0, round(sparsity * weight.numel()) - sum(zeros))
    gone = [round(to_go * sum(others[:end]) / max(1, sum(others))) for end in range(len(others) + 1)]
    return [kept + gone[index + 1] - gone[index] for index, kept in enumerate(zeros)]
