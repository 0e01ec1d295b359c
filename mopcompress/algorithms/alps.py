"""ALPS: one optimisation for the mask and the values of a matrix (Meng et al., https://arxiv.org/abs/2406.07831).

ADMM on min tr((V - W) H (V - W)ᵀ) with at most k non-zero weights in V, H scaled to a unit diagonal (sec. 3.2 and
algorithm 1). A growing penalty pulls a free and a sparse copy of the weight together. At the end the mask is fixed and
`refit` computes its least-squares values.

Differences from the paper: the penalty grows by a fixed factor, not by how much the mask still changes. Thresholds
before the last step come from a sample of the weights, since only the last mask needs an exact count.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mopcompress.algorithms.gram import check_gram
from mopcompress.algorithms.input_statistics import with_ridge
from mopcompress.algorithms.masks import check_pattern, groups_of_rows, lowest_count, n_of_m, sparsity_per_matrix
from mopcompress.algorithms.refit import refit
from mopcompress.algorithms.solution import Solution

_FIRST_PENALTY = 0.2  # for a Gram matrix with unit diagonal; 0.1 in the paper, which takes more steps
_GROWTH = 1.7  # factor from a penalty to the next
_STEPS_PER_PENALTY = 4  # a new penalty costs an inverse, in³ multiply-adds
_RELAXATION = 1.4  # over-relaxation of the steps; 1 in the paper, which needs twice as many steps for the same error
_SAMPLING = 13  # a threshold comes from every 13th weight; prime, so that it samples every column

Shrink = Callable[[Tensor, Tensor], None]
"""(free, into): writes the nearest matrix with the required sparsity into `into`."""


def alps(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    sparsity: float | Sequence[float],
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    steps: int = 12,
    refit_steps: int = 6,
    keep_zeros: bool = False,
    row_groups: Sequence[int] | None = None,
) -> Solution:
    """Zero exactly `round(sparsity * weights)` weights; mask and values solve one problem over all columns.

    The ridge is `damping` times the mean diagonal of the Gram matrix. With `pattern` (n, m), every m consecutive inputs
    of a row get n zeros. `keep_zeros` preserves existing zeros, which count towards the sparsity. `row_groups` are the
    row counts of matrices stacked in `weight` because they share their inputs: each has its own exact count, and
    `sparsity` may be one number per matrix. Costs in² multiply-adds per row and step, and in³ every fourth step.
    """
    check_pattern(sparsity, pattern)
    check_gram(gram)
    zeros = weight == 0 if keep_zeros else None
    groups = groups_of_rows(weight, row_groups)
    counts = [round(s * weight[g].numel()) for g, s in zip(groups, sparsity_per_matrix(sparsity, groups), strict=True)]
    if not any(counts) and not pattern:
        return Solution(weight.detach().clone())
    hessian = with_ridge(gram.to(weight), damping)
    scale = hessian.diagonal().sqrt()
    hessian, scaled = hessian / scale / scale[:, None], weight.detach() * scale

    def shrink(free: Tensor, into: Tensor) -> None:
        if pattern:
            torch.mul(free, ~_mask(free, zeros, groups, counts, pattern), out=into)
            return
        for rows, count in zip(groups, counts, strict=True):
            _shrink(free[rows] if zeros is None else free[rows].masked_fill(zeros[rows], 0.0), count, into[rows])

    free = _run_admm(scaled, hessian, shrink, steps)
    mask = _mask(free, zeros, groups, counts, pattern)
    return Solution(refit(scaled, hessian, mask, free, steps=refit_steps) / scale)


def _run_admm(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], shrink: Shrink, steps: int
) -> Float[Tensor, "out in"]:
    """Return the free copy, dual included, after `steps` over-relaxed steps of ADMM (algorithm 1, in scaled form).

    With Z = shrink(F) for the free copy F and R = 2 Z - F, a step is F + r (X - Z), where X = W + p (R - W) (H + p I)⁻¹
    minimises tr((X - W) H (X - W)ᵀ) + p |X - R|² and r is the relaxation (1: the plain step). The code computes one
    product with Z - (F + W) / 2 and reuses its buffers: passes over memory cost as much as the arithmetic.
    """
    penalty, free, offset, midpoint = _FIRST_PENALTY, *(torch.empty_like(weight) for _ in range(3))
    shrink(weight, free)
    identity = torch.eye(len(hessian)).to(hessian)
    for step in range(steps):
        if step % _STEPS_PER_PENALTY == 0:
            if step:
                penalty *= _GROWTH
                shrink(free, offset)
                torch.lerp(offset, free, 1 / _GROWTH, out=free)  # the dual is scaled by the penalty
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian + penalty * identity))
            inverse.mul_(2 * penalty).sub_(identity).mul_(_RELAXATION)
        shrink(free, offset)
        torch.lerp(free, weight, 0.5, out=midpoint)
        offset.sub_(midpoint)
        free.lerp_(weight, _RELAXATION / 2).addmm_(offset, inverse)
    return free


def _shrink(free: Float[Tensor, "out in"], count: int, into: Float[Tensor, "out in"]) -> None:
    """Write into `into` a copy of `free` with about `count` of its smallest weights set to zero."""
    sample = free.flatten()[::_SAMPLING].abs()
    rank = round(count * len(sample) / free.numel())
    threshold = np.partition(sample.numpy(force=True), rank - 1)[rank - 1] if rank else 0.0
    torch.hardshrink(free, float(threshold), out=into)


def _mask(
    free: Float[Tensor, "out in"],
    zeros: Bool[Tensor, "out in"] | None,
    groups: Sequence[slice],
    counts: Sequence[int],
    pattern: tuple[int, int] | None,
) -> Bool[Tensor, "out in"]:
    """Mark the weights to remove, in exact counts: first existing `zeros`, then those of least magnitude."""
    scores = free.abs()
    if zeros is not None:
        scores.masked_fill_(zeros, -1.0)
    if pattern:
        mask = n_of_m(scores, *pattern)
    else:
        mask = torch.cat([lowest_count(scores[g], count) for g, count in zip(groups, counts, strict=True)])
    return mask if zeros is None else mask | zeros  # there may be more zeros than `counts`
