"""What a compressed linear should reproduce: its own outputs, or those that the dense model had at this place.

A linear behind compressed ones sees inputs x that are not the dense model's. It can be asked for W x, or for W x_dense
(as in GPTAQ, Li et al., https://arxiv.org/abs/2504.02692, for the rounding of GPTQ). The second is the first for
another matrix: with G = mean x xᵀ and C = mean x_dense xᵀ, V* = W C G⁻¹ is the best that any matrix can do, and

    mean |W x_dense - V x|² = tr((V - V*) G (V - V*)ᵀ) + what no V can change,

so every solver may take V* in the place of W and need not know.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.compress.feedback import inverse_factor
from mopcompress.compress.solved import Solved

_STEPS = 30  # of conjugate gradients, when some weights must stay zero


def toward_dense(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    drift: Float[Tensor, "in in"],
    *,
    share: float,
    keep_zeros: bool,
    damping: float = 0.01,
) -> Solved:
    """W + share (V* - W): 0 asks for the linear's own outputs, 1 for the dense model's.

    `drift` is C - G = mean (x_dense - x) xᵀ. The ridge, `damping` times the mean diagonal of the Gram matrix, draws
    towards W: V* = W + W (C - G) (G + ridge)⁻¹, which is W to the bit when nothing drifted. With `keep_zeros`, V* is
    the best among the matrices that are zero where W is (up to 30 steps of conjugate gradients, a row's own each).
    """
    wanted = weight @ drift.to(weight)
    free = weight != 0
    if keep_zeros and not bool(free.all()):
        change = _within(free, wanted, gram.to(weight), damping)
        return Solved(weight + share * change)
    factor = inverse_factor(gram.to(weight), damping=damping)
    return Solved(weight + share * (wanted @ factor.upper.T @ factor.upper), factor.escalations)


def _within(free: Tensor, wanted: Tensor, gram: Tensor, damping: float) -> Tensor:
    """Solve change (G + ridge) = wanted in the free places, row by row, and leave zeros elsewhere."""
    ridge = damping * gram.diagonal().mean()
    scale = 1 / (gram.diagonal() + ridge)
    change = torch.zeros_like(wanted)
    residual = wanted * free
    direction = torch.zeros_like(wanted)
    before = torch.ones_like(wanted[:, :1])
    tiny = torch.finfo(wanted.dtype).tiny
    for _ in range(_STEPS):
        scaled = residual * scale
        length = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + length / before.clamp_min(tiny) * direction
        image = (direction @ gram + ridge * direction) * free
        step = length / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        change += step * direction
        residual -= step * image
        before = length
    return change
