"""Optimal Brain Surgeon in a fixed column order: the error feedback that SparseGPT and GPTQ share.

Each column is fixed in turn, and the later columns compensate for its error (Frantar & Alistarh,
https://arxiv.org/abs/2301.00774 eq. 4 and 5; the Cholesky form is from GPTQ, Frantar et al.,
https://arxiv.org/abs/2210.17323 sec. 3.3). With UᵀU = H⁻¹ and U upper triangular, row j of U over its diagonal is the
amount that each later column absorbs per unit of error in column j.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.gram import check_gram
from mopcompress.errors import NumericalError

LossFn = Callable[[int, Tensor, Tensor], None]
"""(column index, updated column, error): writes into `error` what the column loses when it is fixed."""
ColumnSolver = Callable[[int, Tensor], LossFn]
"""(index of a panel's first column, updated panel [columns, rows]) -> the loss function for the panel's columns."""

_STRIP = 16  # columns fixed one by one between two small matrix products
_LEAF = 128  # up to this size a triangular inverse is one LAPACK call
_FIRST_DAMPING = 1e-4  # the first escalation from a damping of 0


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular `upper` with upperᵀ upper = (gram + ridge I)⁻¹; `escalations` counts increases of the ridge."""

    upper: Float[Tensor, "in in"]
    escalations: int


def inverse_factor(gram: Float[Tensor, "in in"], *, damping: float, max_escalations: int = 4) -> InverseFactor:
    """Return the upper Cholesky factor of the inverse of `gram + damping * mean(diag) I`, without that inverse.

    Reverse rows and columns, factorise as L Lᵀ, reverse back: gram = R Rᵀ with R upper triangular, hence
    gram⁻¹ = R⁻ᵀ R⁻¹, and R⁻¹ is the factor. One Cholesky and one triangular inverse: 2/3 in³ multiply-adds. Damping,
    its escalations and errors are those of `cholesky`.
    """
    lower, escalations = cholesky(gram, damping=damping, max_escalations=max_escalations, backwards=True)
    return InverseFactor(_triangular_inverse(lower).flip(0, 1), escalations)


def cholesky(
    gram: Float[Tensor, "in in"], *, damping: float, max_escalations: int = 4, backwards: bool = False
) -> tuple[Float[Tensor, "in in"], int]:
    """Return the lower Cholesky factor of `gram + damping * mean(diag) I` and the number of damping escalations.

    With `backwards`, the factor is that of the matrix with its rows and columns in reverse order.

    Inputs that never fire (zero diagonal) are decoupled from the rest; the mean is over the others. When the matrix is
    not positive definite, damping increases tenfold, up to `max_escalations` times. Raises `NumericalError` when that
    is not enough, and when the matrix is no Gram matrix at all.
    """
    size = len(gram)
    check_gram(gram)
    diagonal = gram.diagonal()
    dead = diagonal == 0
    scale = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    ridge = damping
    for escalations in range(max_escalations + 1):
        damped = gram.clone()
        damped.diagonal().add_(scale * (dead + ridge))
        damped = damped.flip(0, 1) if backwards else damped
        lower, failed = torch.linalg.cholesky_ex(damped)
        noise = 8 * torch.finfo(gram.dtype).eps * damped.diagonal()  # a pivot of a few roundings is none
        if not failed and bool((lower.diagonal().square() > noise).all()):
            return lower, escalations
        ridge = max(10 * ridge, _FIRST_DAMPING)
    raise NumericalError(
        f"the {size}x{size} input Gram matrix is not positive definite with damping {damping:g}, nor after raising it "
        f"tenfold {max_escalations} times; calibrate on more tokens or ask for more damping"
    )


def sweep(
    weight: Float[Tensor, "out in"],
    factor: InverseFactor,
    solve_panel: ColumnSolver,
    *,
    panel_columns: int,
    block_columns: int = 128,
) -> Float[Tensor, "out in"]:
    """Fix all columns from left to right; after each, the later ones take the least-squares optimal values.

    `solve_panel` is called once per `panel_columns` columns, when these are up to date, and returns the loss function
    of these columns. `block_columns` only decides how updates are batched: columns are updated when the sweep reaches
    them, by one matrix product per block, panel and strip. Costs out * in² / 2 multiply-adds and two copies of the
    weight. A weight that is lost completely is exactly zero afterwards; a rounded one may carry float residue. Raises
    `NumericalError` when the result is not finite.
    """
    size = weight.shape[1]
    block = panel_columns * max(1, block_columns // panel_columns)  # a panel never straddles two blocks
    feedback = (factor.upper / factor.upper.diagonal()[:, None]).T.contiguous()  # [later column, fixed column]
    columns = weight.detach().T.clone(memory_format=torch.contiguous_format)  # contiguous columns make small steps fast
    errors = torch.zeros_like(columns)

    def apply_errors(since: int, first: int, last: int) -> None:
        if since < first:
            columns[first:last].addmm_(feedback[first:last, since:first], errors[since:first], alpha=-1)

    for block_first in range(0, size, block):
        block_last = min(block_first + block, size)
        apply_errors(0, block_first, block_last)
        for first in range(block_first, block_last, panel_columns):
            last = min(first + panel_columns, size)
            apply_errors(block_first, first, last)
            write_loss = solve_panel(first, columns[first:last])
            for strip_first in range(first, last, _STRIP):
                strip = slice(strip_first, min(strip_first + _STRIP, last))
                apply_errors(first, strip.start, strip.stop)
                _solve_strip(columns[strip], errors[strip], feedback[strip, strip], write_loss, strip_first)
    solved = (columns - errors).T.contiguous()
    if not bool(solved.isfinite().all()):
        raise NumericalError("error feedback overflowed; raise damping or check the weights")
    return solved


def _solve_strip(columns: Tensor, errors: Tensor, feedback: Tensor, write_loss: LossFn, first: int) -> None:
    """Fix a few columns one by one, in place. No other loop runs once per column, so this one makes no slices."""
    errors_by_row = errors.T
    for offset, (column, error, column_feedback) in enumerate(
        zip(columns.unbind(), errors.unbind(), feedback.unbind(), strict=True)
    ):
        column.addmv_(errors_by_row, column_feedback, alpha=-1)  # the errors of later columns are still zero
        write_loss(first + offset, column, error)


def _triangular_inverse(lower: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Invert a lower triangular matrix by halves; torch.linalg.solve_triangular would not skip the zeros."""
    size = len(lower)
    if size <= _LEAF:
        return torch.linalg.solve_triangular(lower, torch.eye(size).to(lower), upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _triangular_inverse(lower[:half, :half])
    inverse[half:, half:] = _triangular_inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse
