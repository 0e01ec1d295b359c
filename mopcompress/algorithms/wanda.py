"""Wanda: pruning by weights and activations (Sun et al., https://arxiv.org/abs/2306.11695, eq. 1)."""

from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.masks import check_pattern, lowest, n_of_m
from mopcompress.algorithms.solution import Solution


def wanda(
    weight: Float[Tensor, "out in"],
    input_norms: Float[Tensor, " in"],
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
) -> Solution:
    """Zero exactly the `round(sparsity * in)` weights of every output row with the lowest |weight| * input norm.

    With `pattern` (n, m), zero the n lowest of every m consecutive inputs. The other weights are unchanged.
    """
    check_pattern(sparsity, pattern)
    scores = weight.abs() * input_norms.to(weight)
    mask = n_of_m(scores, *pattern) if pattern else lowest(scores, sparsity)
    return Solution(weight.masked_fill(mask, 0.0))
