"""Masks of the weights to remove, with exact counts. True means removed.

A threshold from a sorted list and a comparison with `<=` remove one weight too many, and more when scores tie, as in
the released SparseGPT code. Here the count is exact: among equal scores the earlier one goes first.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mopcompress.errors import DataError, NumericalError


def lowest(scores: Float[Tensor, "rows columns"], fraction: float) -> Bool[Tensor, "rows columns"]:
    """Mark exactly the `round(fraction * columns)` lowest scores of every row; among equals, earlier columns."""
    return _lowest_in_rows(scores, round(fraction * scores.shape[1]))


def lowest_overall(scores: Float[Tensor, "rows columns"], fraction: float) -> Bool[Tensor, "rows columns"]:
    """Mark exactly the `round(fraction * rows * columns)` lowest scores; among equals, the first in row order."""
    return lowest_count(scores, round(fraction * scores.numel()))


def lowest_count(scores: Float[Tensor, "rows columns"], count: int) -> Bool[Tensor, "rows columns"]:
    """Mark exactly the `count` lowest scores of the whole matrix; among equals, the first in row order."""
    return _lowest_in_rows(scores.reshape(1, -1), count).reshape(scores.shape)


def n_of_m(scores: Float[Tensor, "rows columns"], n: int, m: int) -> Bool[Tensor, "rows columns"]:
    """Mark the `n` lowest scores of every `m` consecutive columns; among equals, earlier columns.

    Raises `DataError` when the rows cannot be cut into groups of `m`.
    """
    rows, columns = scores.shape
    if columns % m:
        raise DataError(f"a {rows}x{columns} weight cannot hold a {n}:{m} pattern: {columns} is no multiple of {m}")
    # a score's rank counts the scores of its group that precede it; m passes over long rows are faster than sorting
    positions = scores.reshape(-1, m).T.contiguous()
    ranks = torch.zeros_like(positions, dtype=torch.int16)
    for position, score in enumerate(positions):
        ranks[position + 1 :] += score <= positions[position + 1 :]
        ranks[:position] += score < positions[:position]
    return (ranks < n).T.reshape(scores.shape)


def check_pattern(sparsity: float | Sequence[float], pattern: tuple[int, int] | None) -> None:
    """Raise `DataError` when a pattern comes with another sparsity than its own."""
    if pattern is None:
        return
    n, m = pattern
    for number in sparsity if isinstance(sparsity, Sequence) else [sparsity]:
        if not math.isclose(number, n / m, abs_tol=0.01):  # 1:3 as 0.33
            raise DataError(
                f"a {n}:{m} pattern removes {n / m:g} of the weights, not {number:g}; set sparsity {n / m:g}"
            )


def groups_of_rows(weight: Float[Tensor, "out in"], row_groups: Sequence[int] | None) -> list[slice]:
    """Return the rows of each matrix in a stack of matrices with `row_groups` rows; None means a single matrix.

    Raises `DataError` when the row counts do not add up to the rows of the stack.
    """
    sizes = [len(weight)] if row_groups is None else list(row_groups)
    if sum(sizes) != len(weight):
        raise DataError(f"row groups {sizes} do not add up to the {len(weight)} rows of the stacked weight")
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def sparsity_per_matrix(sparsity: float | Sequence[float], groups: Sequence[slice]) -> list[float]:
    """Return the sparsity of each matrix in a stack from a single number, or from a number per matrix.

    Raises `DataError` for another number of sparsities.
    """
    if not isinstance(sparsity, Sequence):
        return [sparsity] * len(groups)
    if len(sparsity) != len(groups):
        raise DataError(f"{len(sparsity)} sparsities for {len(groups)} stacked matrices; give one, or one per matrix")
    return list(sparsity)


def _lowest_in_rows(scores: Float[Tensor, "rows columns"], count: int) -> Bool[Tensor, "rows columns"]:
    if not 0 <= count <= scores.shape[1]:
        raise DataError(f"cannot remove {count} of {scores.shape[1]} weights; a sparsity lies between 0 and 1")
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # NumPy's selection is ten times faster than torch.kthvalue, and thirty times faster than a stable sort
    values = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).numpy(force=True)
    threshold = torch.from_numpy(np.partition(values, count - 1, axis=1)[:, count - 1 : count]).to(scores.device)
    if threshold.isnan().any():
        raise NumericalError("the scores to prune by are not numbers; check the weights and the calibration data")
    mask = scores <= threshold
    if bool((mask.sum(1) == count).all()):
        return mask
    below, ties = scores < threshold, scores == threshold
    missing = count - below.sum(1, keepdim=True)
    return below | (ties & (ties.cumsum(1) <= missing))
