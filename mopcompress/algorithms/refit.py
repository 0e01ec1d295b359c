"""The best values for the weights that a mask keeps: masked least squares by projected conjugate gradients.

Minimises tr((V - W) H (V - W)ᵀ) over all V that are zero where the mask is True; H = gram + ridge. Every row is a
problem of its own, but one matrix product serves all rows of a step (Meng et al., ALPS, https://arxiv.org/abs/2406.07831
sec. 3.3, there with the same preconditioner). Ten steps are the exact least squares to three or four digits.
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
    """Improve `start` towards `weight` as seen through `gram`; zero exactly where `removed`.

    `gram` is positive definite, or as good as: whatever ridge there shall be is in it. Every step lowers the error of
    every row, or leaves it; 0 steps only apply the mask. Costs 2 in² multiply-adds a row and two steps.
    """
    kept = (~removed).to(weight)
    solution = start * kept
    if steps == 0:
        return solution
    inverse_diagonal = 1 / gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    residual = ((weight - solution) @ gram).mul_(kept)
    direction = residual * inverse_diagonal
    power = _by_row(residual, direction)
    for _ in range(steps):
        image = (direction @ gram).mul_(kept)
        length = _ratio(power, _by_row(direction, image))
        solution.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        preconditioned = residual * inverse_diagonal
        before, power = power, _by_row(residual, preconditioned)
        direction = preconditioned.addcmul_(direction, _ratio(power, before))
    return solution


def _by_row(left: Float[Tensor, "out in"], right: Float[Tensor, "out in"]) -> Float[Tensor, "out 1"]:
    return torch.linalg.vecdot(left, right)[:, None]


def _ratio(above: Float[Tensor, "out 1"], below: Float[Tensor, "out 1"]) -> Float[Tensor, "out 1"]:
    """0 where a row is solved already: there both are 0, or a rounding away from it."""
    return torch.where(below > 0, above / below, 0.0)
