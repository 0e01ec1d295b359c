"""Dense targets: fit each compressed linear to the dense model's outputs (GPTAQ).

A linear behind compressed ones sees inputs x that differ from the dense model's. Its target is W x, or W x_dense as in
GPTAQ (Li et al., https://arxiv.org/abs/2504.02692), which does this for the rounding of GPTQ. The second target is the
first one for another matrix: with G = mean x xᵀ and C = mean x_dense xᵀ, the best matrix is V* = W C G⁻¹, and

    mean |W x_dense - V x|² = tr((V - V*) G (V - V*)ᵀ) + a constant in V,

so every solver can compress V* in the place of W without a change.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.input_statistics import cross_moment, input_shift, with_ridge
from mopcompress.algorithms.obs import cholesky
from mopcompress.algorithms.refit import refit
from mopcompress.algorithms.solution import Solution

_PRUNED = 0.01  # with a smaller fraction of zeros no refit follows: the other weights would hardly move
_STEPS = 30  # of the refit, when some weights must stay zero


@dataclass(frozen=True)
class DenseActivations:
    """The dense model's inputs of linears that share them, for all calibration tokens or the first ones.

    Where their outputs are fewer numbers, these are stored instead, side by side and without biases: W C is then
    mean (W x_dense) xᵀ.
    """

    values: Float[Tensor, "tokens in_or_out"]
    are_outputs: bool

    def target_shift(
        self, weight: Float[Tensor, "out in"], inputs: Float[Tensor, "all_tokens in"]
    ) -> Float[Tensor, "out in"]:
        """Return W (C - G) = mean (W x_dense - W x) xᵀ, the shift of the outputs, for all linears stacked by rows.

        The mean is over the tokens that the dense model processed. Without drift the result is exactly 0 from inputs.
        From outputs it is 0 up to rounding, since products of all tokens and of a few round differently.
        """
        paired = inputs[: len(self.values)]
        if self.are_outputs:
            return cross_moment(self.values - paired @ weight.T, paired)
        return weight @ input_shift(paired, self.values).to(weight)


def dense_target(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    shift: Float[Tensor, "out in"],
    *,
    fraction: float,
    keep_zeros: bool,
    damping: float = 0.1,
) -> Solution:
    """Return W + fraction (V* - W): the target is the linear's own outputs for 0, the dense model's for 1.

    `shift` is W (C - G) = mean W (x_dense - x) xᵀ. The ridge, `damping` times the mean diagonal of the Gram matrix,
    pulls V* = W + W (C - G) (G + ridge)⁻¹ towards W; V* is exactly W when `shift` is 0. With `keep_zeros`, V* is the
    best of the matrices that are zero where W is. The ridge is ten times that of the solvers, because V* overfits few
    tokens sooner than a mask does (benchmarks/LOG.md).
    """
    lower, escalations = cholesky(gram.to(weight), damping=damping)
    change = torch.cholesky_solve(shift.to(weight).T, lower).T
    zeros = weight == 0
    if keep_zeros and bool(zeros.any()):
        best = weight + change
        steps = _STEPS if float(zeros.float().mean()) >= _PRUNED else 0
        change = refit(best, with_ridge(gram.to(weight), damping), zeros, best, steps=steps) - weight
    return Solution(weight + fraction * change, escalations)
