"""The Gram matrix of a layer's inputs: all that least squares on the layer's outputs needs of them."""

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.errors import NumericalError

_PANELS = 8  # column panels of the Gram matrix: its upper triangle then costs 9/16 of the whole product


class InputGram:
    """Mean of x xᵀ over calibration tokens: half the Hessian of the layer's squared output error.

    The mean is per *token*; SparseGPT's released code divides by sequences. The solvers use the matrix up to a positive
    factor only, so masks and updates agree. The sum is in fp32 (fp64 for fp64 inputs), and of the upper triangle only.
    """

    def __init__(self) -> None:
        self._upper: Tensor | None = None  # on and above the diagonal; below it panels hold leftovers
        self._tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Add a batch of tokens. Raises `NumericalError` when an input is not finite."""
        inputs = at_least_float32(inputs)
        size = inputs.shape[1]
        if self._upper is None:
            self._upper = inputs.new_zeros(size, size)
        width = -(-size // _PANELS)
        for first in range(0, size, width):
            panel = slice(first, first + width)
            self._upper[panel, first:].addmm_(inputs[:, panel].T, inputs[:, first:])
        check_finite(self._upper.diagonal())  # sums of squares: a bad input stays visible in them
        self._tokens += len(inputs)

    def mean(self) -> Float[Tensor, "in in"]:
        """Return the symmetric mean. Raises `NumericalError` when there were no tokens."""
        upper = require_tokens(self._upper, self._tokens).triu() / self._tokens
        return upper + upper.triu(1).T


def check_gram(gram: Float[Tensor, "in in"]) -> None:
    """Raise `NumericalError` when the matrix is not finite or not symmetric.

    The checks are cheap: a sum is not finite when an entry is not, and a product with one vector tells a matrix from
    its transpose.
    """
    size = len(gram)
    if not bool(gram.sum().isfinite()):
        raise NumericalError(f"the {size}x{size} input Gram matrix is not finite; check the calibration data")
    probe = torch.linspace(1, 2, size).to(gram)
    if not bool((gram @ probe - probe @ gram).abs().max() <= 1e-3 * gram.diagonal().max()):
        raise NumericalError(f"the {size}x{size} input Gram matrix is not symmetric; pass the mean of x xᵀ over tokens")


def at_least_float32(inputs: Tensor) -> Tensor:
    """Convert inputs to a dtype that is precise enough for sums."""
    return inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))


def check_finite(sums_of_squares: Float[Tensor, " in"]) -> None:
    """Raise `NumericalError` naming the first input with a value that was not finite."""
    bad = sums_of_squares.isfinite().logical_not()
    if bad.any():
        raise NumericalError(
            f"{int(bad.sum())} of {len(bad)} layer inputs (the first is input {int(bad.nonzero()[0])}) are not finite "
            f"on the calibration data; remove the documents that overflow or load the model in fp32"
        )


def require_tokens(total: Tensor | None, tokens: int) -> Tensor:
    """Return `total`, a sum over `tokens` tokens. Raises `NumericalError` when there were none."""
    if total is None or tokens == 0:
        raise NumericalError("no calibration token reached this layer; calibrate on more tokens")
    return total
