"""Compression of one weight matrix: pure functions of a weight and a statistic of its inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.alps import alps
from mopcompress.algorithms.gptq import gptq
from mopcompress.algorithms.gram import InputGram
from mopcompress.algorithms.input_statistics import InputNorms, NoStatistic, Statistic
from mopcompress.algorithms.magnitude import magnitude
from mopcompress.algorithms.solution import QuantizedWeight, Solution
from mopcompress.algorithms.sparsegpt import sparsegpt
from mopcompress.algorithms.wanda import wanda

__all__ = ["METHODS", "Method", "QuantizedWeight", "Solution"]


@dataclass(frozen=True)
class Method:
    """`solve(weight, statistic(inputs), **options)` compresses one matrix, or several stacked by rows."""

    solve: Callable[..., Solution]
    accumulator: Callable[[], Statistic]
    stacks: bool = False  # `solve` takes `row_groups`: several matrices with the same inputs in one sweep

    def statistic(self, inputs: Float[Tensor, "tokens in"]) -> Tensor | None:
        """What `solve` needs to know about the inputs, when they are all there at once."""
        seen = self.accumulator()
        seen.update(inputs)
        return seen.mean()

    def solve_together(self, weights: Sequence[Tensor], statistic: Tensor | None, **options: Any) -> list[Solution]:
        """Compress matrices that share their inputs in one go: the same result as one by one, but faster.

        `sparsity`, for methods that have it, may be one share a matrix.
        """
        if not self.stacks:
            share = options.get("sparsity")
            own = [{"sparsity": one} for one in share] if isinstance(share, Sequence) else [{}] * len(weights)
            pairs = zip(weights, own, strict=True)
            return [self.solve(weight, statistic, **options | mine) for weight, mine in pairs]
        sizes = [len(weight) for weight in weights]
        stack = self.solve(torch.cat(list(weights)), statistic, row_groups=sizes, **options)
        return [Solution(weight, stack.escalations) for weight in torch.split(stack.weight, sizes)]


METHODS = {
    "magnitude": Method(magnitude, NoStatistic),
    "wanda": Method(wanda, InputNorms),
    "sparsegpt": Method(sparsegpt, InputGram, stacks=True),
    "alps": Method(alps, InputGram, stacks=True),
    "gptq": Method(gptq, InputGram),
}
