"""What a compressed linear should reproduce: its own outputs, or those that the dense model had at this place.

A linear behind compressed ones sees inputs x that are not the dense model's. It can be asked for W x, or for W x_dense
(as in GPTAQ, Li et al., https://arxiv.org/abs/2504.02692, for the rounding of GPTQ). The second is the first for
another matrix: with G = mean x xᵀ and C = mean x_dense xᵀ, V* = W C G⁻¹ is the best that any matrix can do, and

    mean |W x_dense - V x|² = tr((V - V*) G (V - V*)ᵀ) + what no V can change,

so every solver may take V* in the place of W and need not know.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.input_statistics import cross_moment, input_shift, with_ridge
from mopcompress.algorithms.obs import cholesky
from mopcompress.algorithms.refit import refit
from mopcompress.algorithms.solution import Solution

_PRUNED = 0.01  # fewer zeros than this are kept without a refit of the others, which would hardly move
_STEPS = 30  # of the refit, when some weights must stay zero


@dataclass(frozen=True)
class DenseActivations:
    """What the dense model had where linears share their inputs, for the first tokens of the calibration or all.

    Their inputs; or their outputs side by side, biases left out, where these are fewer: W C = mean (W x_dense) xᵀ.
    """

    values: Float[Tensor, "tokens in_or_out"]
    are_outputs: bool

    def target_shift(
        self, weight: Float[Tensor, "out in"], inputs: Float[Tensor, "all_tokens in"]
    ) -> Float[Tensor, "out in"]:
        """W (C - G) = mean (W x_dense - W x) xᵀ, how the linears' outputs moved, for all of them stacked.

        The mean is over the tokens that the dense model saw. From inputs, nothing that drifted gives 0 to the bit; from
        outputs, 0 to the roundings between a product of all tokens and one of a few.
        """
        same = inputs[: len(self.values)]
        if self.are_outputs:
            return cross_moment(self.values - same @ weight.T, same)
        return weight @ input_shift(same, self.values).to(weight)


def dense_target(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    pull: Float[Tensor, "out in"],
    *,
    share: float,
    keep_zeros: bool,
    damping: float = 0.1,
) -> Solution:
    """W + share (V* - W): 0 asks for the linear's own outputs, 1 for the dense model's.

    `pull` is W (C - G) = mean W (x_dense - x) xᵀ. The ridge, `damping` times the Gram matrix's mean diagonal, draws
    towards W: V* = W + W (C - G) (G + ridge)⁻¹, which is W to the bit when nothing pulls. With `keep_zeros`, V* of a
    pruned weight is the best among the matrices that are zero where W is. The ridge is ten times that of the solvers:
    V* is fitted to what few tokens have in common, and overfits them sooner than a mask does (benchmarks/LOG.md).
    """
    lower, escalations = cholesky(gram.to(weight), damping=damping)
    change = torch.cholesky_solve(pull.to(weight).T, lower).T
    zeros = weight == 0
    if keep_zeros and bool(zeros.any()):
        best = weight + change
        steps = _STEPS if float(zeros.float().mean()) >= _PRUNED else 0
        change = refit(best, with_ridge(gram.to(weight), damping), zeros, best, steps=steps) - weight
    return Solution(weight + share * change, escalations)
