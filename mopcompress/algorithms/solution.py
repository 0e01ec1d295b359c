"""What a compression method gives back for one weight matrix."""

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
        return len(self.down)

    @property
    def parameters_stored(self) -> int:
        """Numbers in both matrices."""
        return self.up.numel() + self.down.numel()

    def rounded(self, dtype: torch.dtype) -> "LowRankFactors":
        """Copies of both matrices in `dtype`."""
        return LowRankFactors(self.up.to(dtype, copy=True), self.down.to(dtype, copy=True))


@dataclass(frozen=True)
class Solution:
    """A compressed weight. `escalations` counts how often damping had to be raised to factorise the Gram matrix.

    `repair` is what is to be computed beside it, if that was asked for.
    """

    weight: Float[Tensor, "out in"]
    escalations: int = 0
    repair: LowRankFactors | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight(Solution):
    """`weight` is exactly `codes * scales`, the scale of an input being that of its group of consecutive columns.

    Scales are numbers that fp16 can hold, as the GPTQ and compressed-tensors formats store them, so an export loses
    nothing.
    """

    codes: Int[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
