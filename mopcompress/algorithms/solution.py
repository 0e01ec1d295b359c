"""Results of a compression method for one weight matrix."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LowRankFactors:
    """Two matrices whose product is added to a weight: y = W x + up (down x)."""

    up: Float[Tensor, "out rank"]
    down: Float[Tensor, "rank in"]

    @property
    def rank(self) -> int:
        """The rank of the product, at most."""
        return len(self.down)

    @property
    def parameters_stored(self) -> int:
        """Count the numbers in both matrices."""
        return self.up.numel() + self.down.numel()

    def rounded(self, dtype: torch.dtype) -> "LowRankFactors":
        """Copy both matrices in `dtype`."""
        return LowRankFactors(self.up.to(dtype, copy=True), self.down.to(dtype, copy=True))


@dataclass(frozen=True)
class Solution:
    """A compressed weight. `escalations` counts how often damping increased before the Gram matrix had a factor.

    `repair` is a low-rank matrix that is added to the weight at run time, or None.
    """

    weight: Float[Tensor, "out in"]
    escalations: int = 0
    repair: LowRankFactors | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight(Solution):
    """A weight on a grid: exactly `codes * scales`, with one scale per row and group of consecutive columns.

    Scales are numbers that fp16 can hold, as the GPTQ and compressed-tensors formats store them, so an export loses
    nothing.
    """

    codes: Int[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
