"""Magnitude pruning: the smallest weights of a matrix go. The baseline that looks at no data."""

from jaxtyping import Float
from torch import Tensor

from mopcompress.compress.masks import check_pattern, lowest_overall, n_of_m
from mopcompress.compress.solved import Solved


def magnitude(
    weight: Float[Tensor, "out in"],
    statistic: None,
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
) -> Solved:
    """Zero exactly `round(sparsity * weights)` of the smallest weights of the matrix; the rest are untouched.

    With `pattern` (n, m): the n smallest of every m consecutive inputs.
    """
    check_pattern(sparsity, pattern)
    mask = n_of_m(weight.abs(), *pattern) if pattern else lowest_overall(weight.abs(), sparsity)
    return Solved(weight.masked_fill(mask, 0.0))
