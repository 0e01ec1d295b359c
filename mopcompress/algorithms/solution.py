"""What a compression method gives back for one weight matrix."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.models.repair import LowRank


@dataclass(frozen=True)
class Solved:
    """A compressed weight. `escalations` counts how often damping had to be raised to factorise the Gram matrix.

    `repair` is what is to be computed beside it, if that was asked for.
    """

    weight: Float[Tensor, "out in"]
    escalations: int = 0
    repair: LowRank | None = None


@dataclass(frozen=True, kw_only=True)
class Quantised(Solved):
    """`weight` is exactly `codes * scales`, the scale of an input being that of its group of consecutive columns.

    Scales are numbers that fp16 can hold, as the GPTQ and compressed-tensors formats store them, so an export loses
    nothing.
    """

    codes: Int[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
