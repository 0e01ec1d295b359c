"""ALPS: which weights stay, and their values, found together (Meng et al., https://arxiv.org/abs/2406.07831).

ADMM on min tr((V - W) H (V - W)ᵀ) with at most k weights of V not zero, H scaled to a unit diagonal (sec. 3.2 and
algorithm 1). A free and a sparse copy of the weight are drawn together by a penalty that grows; at the end the mask is
fixed and `refit` gives its least-squares values. Differences from the paper: the penalty grows by a fixed factor, there
by how much the mask still moves; and the thresholds before the last step come from a sample of the weights, since only
the last mask needs its exact count.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mopcompress.compress.feedback import check_gram
from mopcompress.compress.masks import check_pattern, groups_of_rows, lowest_count, n_of_m, share_of_each
from mopcompress.compress.refit import refit
from mopcompress.compress.solved import Solved
from mopcompress.compress.statistics import with_ridge

_FIRST_PENALTY = 0.1  # as in the paper; the Gram matrix has a unit diagonal
_GROWTH = 1.35  # of the penalty
_STEPS_A_PENALTY = 3  # a new penalty costs an inverse, in³ multiply-adds
_SAMPLING = 13  # every 13th weight tells a threshold; prime, so that no column is left out

Project = Callable[[Tensor], Tensor]
"""The nearest matrix that is as sparse as it shall be."""


def alps(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    sparsity: float | Sequence[float],
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    steps: int = 24,
    refit_steps: int = 6,
    keep_zeros: bool = False,
    row_groups: Sequence[int] | None = None,
) -> Solved:
    """Zero exactly `round(sparsity * weights)` weights; mask and values solve one problem over all columns.

    The ridge is `damping` times the Gram matrix's mean diagonal. With `pattern` (n, m): n zeros in every m inputs of a
    row. `keep_zeros` keeps the zeros that are there; they count. `row_groups` are the row counts of matrices stacked in
    `weight` because they share their inputs: each has its own exact count, and may have its own `sparsity`. Costs in²
    multiply-adds a row and step, and in³ every third step.
    """
    check_pattern(sparsity, pattern)
    check_gram(gram)
    zeros = weight == 0 if keep_zeros else None
    groups = groups_of_rows(weight, row_groups)
    counts = [round(s * weight[g].numel()) for g, s in zip(groups, share_of_each(sparsity, groups), strict=True)]
    if not any(counts) and not pattern:
        return Solved(weight.detach().clone())
    hessian = with_ridge(gram.to(weight), damping)
    scale = hessian.diagonal().sqrt()
    hessian, scaled = hessian / scale / scale[:, None], weight.detach() * scale

    def approximately(free: Tensor) -> Tensor:
        if pattern:
            return exactly(free)
        free = free if zeros is None else free.masked_fill(zeros, 0.0)
        return torch.cat([_shrunk(free[g], count) for g, count in zip(groups, counts, strict=True)])

    def exactly(free: Tensor) -> Tensor:
        return free.masked_fill(_mask(free, zeros, groups, counts, pattern), 0.0)

    free = _draw_together(scaled, hessian, approximately, steps)
    mask = _mask(free, zeros, groups, counts, pattern)
    return Solved(refit(scaled, hessian, mask, free, steps=refit_steps) / scale)


def _draw_together(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], project: Project, steps: int
) -> Float[Tensor, "out in"]:
    """The free copy, dual included, after `steps` steps of ADMM (algorithm 1, in scaled form).

    Products go into matrices that are there already: new ones cost as much as the arithmetic.
    """
    identity = torch.eye(len(hessian)).to(hessian)
    penalty = _FIRST_PENALTY
    wanted = weight @ hessian
    dual, pulled, free = torch.zeros_like(weight), torch.empty_like(weight), weight.clone()
    sparse = project(weight)
    for step in range(steps):
        if step % _STEPS_A_PENALTY == 0:
            if step:
                penalty *= _GROWTH
                dual /= _GROWTH
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian + penalty * identity))
        torch.sub(sparse, dual, out=pulled).mul_(penalty).add_(wanted)
        torch.addmm(dual, pulled, inverse, out=free)
        sparse = project(free)
        torch.sub(free, sparse, out=dual)
    return free


def _shrunk(free: Float[Tensor, "out in"], count: int) -> Float[Tensor, "out in"]:
    """About `count` of the smallest weights set to zero."""
    sample = free.flatten()[::_SAMPLING].abs()
    rank = round(count * len(sample) / free.numel())
    if rank == 0:
        return free
    threshold = np.partition(sample.numpy(force=True), rank - 1)[rank - 1]
    return torch.nn.functional.hardshrink(free, float(threshold))


def _mask(
    free: Float[Tensor, "out in"],
    zeros: Bool[Tensor, "out in"] | None,
    groups: Sequence[slice],
    counts: Sequence[int],
    pattern: tuple[int, int] | None,
) -> Bool[Tensor, "out in"]:
    """What goes: exact counts, zeros that are to be kept first."""
    scores = free.abs()
    if zeros is not None:
        scores.masked_fill_(zeros, -1.0)
    if pattern:
        mask = n_of_m(scores, *pattern)
    else:
        mask = torch.cat([lowest_count(scores[g], count) for g, count in zip(groups, counts, strict=True)])
    return mask if zeros is None else mask | zeros  # there may be more zeros than asked for
