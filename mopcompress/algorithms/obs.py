"""Error feedback shared by SparseGPT and GPTQ: settle one column, let the later columns make up for the error.

Optimal Brain Surgeon in a fixed column order (Frantar & Alistarh, https://arxiv.org/abs/2301.00774 eq. 4 and 5; the
Cholesky form is from GPTQ, https://arxiv.org/abs/2210.17323 sec. 3.3). With UᵀU = H⁻¹ and U upper triangular, row j of
U over its diagonal is what each later column has to absorb of one unit of error in column j.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.gram import check_gram
from mopcompress.errors import NumericalError

LossFn = Callable[[int, Tensor, Tensor], None]
"""(column index, column as it is now, error): writes into `error` what the column loses when it is settled."""
ColumnSolver = Callable[[int, Tensor], LossFn]
"""(index of a panel's first column, panel [columns, rows] up to date) -> how to settle each of its columns."""

_STRIP = 16  # columns settled one by one between two small matrix products
_LEAF = 128  # below this size a triangular inverse is one LAPACK call
_FIRST_DAMPING = 1e-4  # where the ladder starts when no damping was asked for


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular `upper` with upperᵀ upper = (gram + ridge I)⁻¹; `escalations` counts raises of the ridge."""

    upper: Float[Tensor, "in in"]
    escalations: int


def inverse_factor(gram: Float[Tensor, "in in"], *, damping: float, max_escalations: int = 4) -> InverseFactor:
    """Upper Cholesky factor of the inverse of `gram + damping * mean(diag) I`, without forming the inverse.

    Reverse rows and columns, factorise as L Lᵀ, reverse back: gram = R Rᵀ with R upper triangular, hence
    gram⁻¹ = R⁻ᵀ R⁻¹, and R⁻¹ is the factor. One Cholesky and one triangular inverse: 2/3 in³ multiply-adds. Damped as
    by `cholesky`.
    """
    lower, escalations = cholesky(gram, damping=damping, max_escalations=max_escalations, backwards=True)
    return InverseFactor(_triangular_inverse(lower).flip(0, 1), escalations)


def cholesky(
    gram: Float[Tensor, "in in"], *, damping: float, max_escalations: int = 4, backwards: bool = False
) -> tuple[Float[Tensor, "in in"], int]:
    """Lower Cholesky factor of `gram + damping * mean(diag) I`, and how often damping was raised.

    `backwards` is for the factor of the matrix with its rows and columns in reverse order.

    Inputs that never fire (zero diagonal) are decoupled from the rest; the mean is taken over the others. When the
    matrix is not positive definite, damping is raised tenfold up to `max_escalations` times and the raises are counted;
    then, or when the matrix is no Gram matrix at all, `NumericalError` is raised.
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
        noise = 8 * torch.finfo(gram.dtype).eps * damped.diagonal()  # a few roundings
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
    settle: ColumnSolver,
    *,
    panel_columns: int,
    block_columns: int = 128,
) -> Float[Tensor, "out in"]:
    """Settle all columns from left to right; after each, the later ones take the least-squares optimal values.

    `settle` is called once for every `panel_columns` columns, when those are up to date, and returns the function that
    settles each of them. `block_columns` only decides how updates are batched: columns are brought up to date when they
    are reached, by one matrix product a block, panel and strip. Costs out * in² / 2 multiply-adds and two copies of the
    weight. A weight that is lost completely is exactly zero afterwards; a rounded one may be off by float residue.
    """
    size = weight.shape[1]
    block = panel_columns * max(1, block_columns // panel_columns)  # a panel never straddles two blocks
    shares = (factor.upper / factor.upper.diagonal()[:, None]).T.contiguous()  # [later column, settled column]
    columns = weight.detach().T.clone(memory_format=torch.contiguous_format)  # contiguous columns make small steps fast
    errors = torch.zeros_like(columns)

    def catch_up(since: int, first: int, last: int) -> None:
        if since < first:
            columns[first:last].addmm_(shares[first:last, since:first], errors[since:first], alpha=-1)

    for block_first in range(0, size, block):
        block_last = min(block_first + block, size)
        catch_up(0, block_first, block_last)
        for first in range(block_first, block_last, panel_columns):
            last = min(first + panel_columns, size)
            catch_up(block_first, first, last)
            reject = settle(first, columns[first:last])
            for strip_first in range(first, last, _STRIP):
                strip = slice(strip_first, min(strip_first + _STRIP, last))
                catch_up(first, strip.start, strip.stop)
                _solve_strip(columns[strip], errors[strip], shares[strip, strip], reject, strip_first)
    settled = (columns - errors).T.contiguous()
    if not bool(settled.isfinite().all()):
        raise NumericalError("error feedback overflowed; raise damping or check the weights")
    return settled


def _solve_strip(columns: Tensor, errors: Tensor, shares: Tensor, reject: LossFn, first: int) -> None:
    """Settle a few columns one by one, in place: the only loop that runs once a column, so it makes no slices."""
    errors_by_row = errors.T
    for offset, (column, error, share) in enumerate(
        zip(columns.unbind(), errors.unbind(), shares.unbind(), strict=True)
    ):
        column.addmv_(errors_by_row, share, alpha=-1)  # errors from here on are still zero
        reject(first + offset, column, error)


def _triangular_inverse(lower: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Inverse of a lower triangular matrix by halves; torch.linalg.solve_triangular would not skip the zeros."""
    size = len(lower)
    if size <= _LEAF:
        return torch.linalg.solve_triangular(lower, torch.eye(size).to(lower), upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _triangular_inverse(lower[:half, :half])
    inverse[half:, half:] = _triangular_inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse
