"""Magnitude pruning: remove the smallest weights (Han et al., https://arxiv.org/abs/1506.02626), without data."""

from collections.abc import Callable, Iterable
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.algorithms.masks import check_pattern, lowest_overall, n_of_m
from mopcompress.algorithms.solution import Solution


def magnitude(
    weight: Float[Tensor, "out in"],
    statistic: None,
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
) -> Solution:
    """Zero exactly the `round(sparsity * weights)` smallest weights of the matrix; the others are unchanged.

    With `pattern` (n, m), zero the n smallest of every m consecutive inputs.
    """
    check_pattern(sparsity, pattern)
    mask = n_of_m(weight.abs(), *pattern) if pattern else lowest_overall(weight.abs(), sparsity)
    return Solution(weight.masked_fill(mask, 0.0))


def global_threshold_sparsities(
    weights: Callable[[], Iterable[tuple[str, Tensor]]], sparsity: float
) -> dict[str, float]:
    """Return the sparsity of each matrix when one threshold removes the smallest weights of all matrices.

    Exactly `round(sparsity * weights)` of all weights go; among equal magnitudes, those of earlier matrices go first.
    `weights()` iterates over all matrices by name; it is called three times, and a single matrix is in memory at a
    time. Magnitudes are compared in float32, whose order is the order of their bits.
    """
    counts = reduce(torch.add, (_counts(_bits(weight) >> 16) for _, weight in weights()))
    upper, rank = _find_bin(round(sparsity * int(counts.sum())), counts)
    lower_halves = (bits[bits >> 16 == upper] & 0xFFFF for bits in (_bits(weight) for _, weight in weights()))
    lower, ties_left = _find_bin(rank, reduce(torch.add, map(_counts, lower_halves)))
    threshold, sparsities = upper << 16 | lower, {}
    for name, weight in weights():
        bits = _bits(weight)
        ties = min(ties_left, int((bits == threshold).sum()))
        ties_left -= ties
        sparsities[name] = (int((bits < threshold).sum()) + ties) / weight.numel()
    return sparsities


def _bits(weight: Float[Tensor, "_ _"]) -> Int[Tensor, " weights"]:
    return weight.detach().abs().float().reshape(-1).view(torch.int32)


def _counts(values: Int[Tensor, " values"]) -> Int[Tensor, " bins"]:
    return torch.bincount(values, minlength=1 << 16)


def _find_bin(rank: int, counts: Int[Tensor, " bins"]) -> tuple[int, int]:
    """Return the bin with the value of this rank (1 is the smallest), and its rank inside that bin."""
    cumulative = counts.cumsum(0)
    index = int(torch.searchsorted(cumulative, max(1, rank)))
    return index, rank - int(cumulative[index] - counts[index])
