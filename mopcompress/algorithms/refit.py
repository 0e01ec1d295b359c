"""Masked least squares by projected conjugate gradients: the best values for the weights that a mask leaves.

Minimises tr((V - W) H (V - W)ᵀ) over all V that are zero where the mask is True; H = gram + ridge. Every row is a
separate problem, but one matrix product per step serves all rows (Meng et al., ALPS, https://arxiv.org/abs/2406.07831
sec. 3.3, with the same preconditioner). Ten steps give the exact least squares to three or four digits.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def refit(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    removed: Bool[Tensor, "out in"],
    start: Float[Tensor, "out in"],
    *,
    steps: int,
) -> Float[Tensor, "out in"]:
    """Improve `start` towards `weight` in the norm of `gram`; the result is exactly zero where `removed`.

    `gram` includes the ridge and is positive definite up to rounding. No step raises the error of a row; 0 steps only
    apply the mask. Costs in² multiply-adds per row and step, and in² per row at the start.
    """
    mask = (~removed).to(weight)  # 1 for the weights that stay
    solution = start * mask
    if steps == 0:
        return solution
    inverse_diagonal = 1 / gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    residual = ((weight - solution) @ gram).mul_(mask)
    direction = residual * inverse_diagonal
    power = _dot_rows(residual, direction)
    for _ in range(steps):
        image = (direction @ gram).mul_(mask)
        length = _safe_ratio(power, _dot_rows(direction, image))
        solution.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        preconditioned = residual * inverse_diagonal
        previous_power, power = power, _dot_rows(residual, preconditioned)
        direction = preconditioned.addcmul_(direction, _safe_ratio(power, previous_power))
    return solution


def _dot_rows(left: Float[Tensor, "out in"], right: Float[Tensor, "out in"]) -> Float[Tensor, "out 1"]:
    return torch.linalg.vecdot(left, right)[:, None]


def _safe_ratio(numerator: Float[Tensor, "out 1"], denominator: Float[Tensor, "out 1"]) -> Float[Tensor, "out 1"]:
    """Divide row by row. A row that is solved already has two zeros, up to rounding, and gets 0."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
