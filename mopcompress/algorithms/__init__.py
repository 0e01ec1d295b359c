"""Compression of one weight matrix: pure functions of a weight and a statistic of its inputs.

Methods, each after a paper:

- `magnitude.py`: magnitude pruning, the baseline without data.
- `wanda.py`: Wanda (Sun et al., https://arxiv.org/abs/2306.11695).
- `sparsegpt.py`: SparseGPT (Frantar & Alistarh, https://arxiv.org/abs/2301.00774).
- `alps.py`: ALPS (Meng et al., https://arxiv.org/abs/2406.07831).
- `gptq.py`: GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323).
- `structured.py`: removal of whole groups of inputs, after SlimGPT (Ling et al., https://arxiv.org/abs/2412.18110).
- `eora.py`: EoRA, a low-rank repair (Liu et al., https://arxiv.org/abs/2410.21271).
- `dense_targets.py`: the dense model's outputs as a target, after GPTAQ (Li et al., https://arxiv.org/abs/2504.02692).
- `sparsity_allocation.py`: a sparsity per linear: OWL (Yin et al., https://arxiv.org/abs/2310.05175), a ramp over the
  blocks (Huang et al., https://arxiv.org/abs/2502.14770) and an error-driven one.

Shared parts: `input_statistics.py` and `gram.py` (statistics of the inputs), `masks.py` (masks with exact counts),
`obs.py` (error feedback in a fixed column order), `refit.py` (masked least squares) and `solution.py` (results).
"""

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
    """A solver and the statistic that it needs: `solve(weight, statistic(inputs), **options)` compresses a matrix."""

    solve: Callable[..., Solution]
    accumulator: Callable[[], Statistic]
    stacks: bool = False  # `solve` takes `row_groups`: several matrices with the same inputs in one sweep

    def statistic(self, inputs: Float[Tensor, "tokens in"]) -> Tensor | None:
        """Compute the statistic for `solve` from all inputs at once."""
        accumulator = self.accumulator()
        accumulator.update(inputs)
        return accumulator.mean()

    def solve_together(self, weights: Sequence[Tensor], statistic: Tensor | None, **options: Any) -> list[Solution]:
        """Compress matrices that share their inputs in one call: the result of separate calls, but faster.

        For methods with a `sparsity`, it may be a sequence with one number per matrix.
        """
        if not self.stacks:
            sparsity = options.get("sparsity")
            each = (
                [{"sparsity": number} for number in sparsity] if isinstance(sparsity, Sequence) else [{}] * len(weights)
            )
            pairs = zip(weights, each, strict=True)
            return [self.solve(weight, statistic, **options | changes) for weight, changes in pairs]
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
