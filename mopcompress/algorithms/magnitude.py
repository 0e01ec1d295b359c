"""Magnitude pruning: the smallest weights of a matrix go. The baseline that looks at no data."""

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
    """Zero exactly `round(sparsity * weights)` of the smallest weights of the matrix; the rest are untouched.

    With `pattern` (n, m): the n smallest of every m consecutive inputs.
    """
    check_pattern(sparsity, pattern)
    mask = n_of_m(weight.abs(), *pattern) if pattern else lowest_overall(weight.abs(), sparsity)
    return Solution(weight.masked_fill(mask, 0.0))


def one_threshold(weights: Callable[[], Iterable[tuple[str, Tensor]]], sparsity: float) -> dict[str, float]:
    """The share that each matrix loses when the smallest weights of all of them go: `round(sparsity * weights)` in all.

    `weights` gives all matrices, by name, each time that it is called: three times, and one is held at a time. Of equal
    magnitudes those of earlier matrices go first. They are compared in float32, whose order is that of their bits.
    """
    counts = reduce(torch.add, (_counts(_bits(one) >> 16) for _, one in weights()))
    upper, left = _bin_of(round(sparsity * int(counts.sum())), counts)
    inside = (bits[bits >> 16 == upper] & 0xFFFF for bits in (_bits(one) for _, one in weights()))
    lower, left = _bin_of(left, reduce(torch.add, map(_counts, inside)))
    threshold, shares = upper << 16 | lower, {}
    for name, weight in weights():
        bits = _bits(weight)
        ties = min(left, int((bits == threshold).sum()))
        left -= ties
        shares[name] = (int((bits < threshold).sum()) + ties) / weight.numel()
    return shares


def _bits(weight: Float[Tensor, "_ _"]) -> Int[Tensor, " weights"]:
    return weight.detach().abs().float().reshape(-1).view(torch.int32)


def _counts(values: Int[Tensor, " values"]) -> Int[Tensor, " bins"]:
    return torch.bincount(values, minlength=1 << 16)


def _bin_of(rank: int, counts: Int[Tensor, " bins"]) -> tuple[int, int]:
    """The bin that holds the value of this rank (1 is the smallest), and its rank among those of the bin."""
    upto = counts.cumsum(0)
    found = int(torch.searchsorted(upto, max(1, rank)))
    return found, rank - int(upto[found] - counts[found])
