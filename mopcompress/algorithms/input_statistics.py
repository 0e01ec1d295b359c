"""Statistics of the inputs of a layer, accumulated batch by batch in constant memory."""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.gram import at_least_float32, check_finite, require_tokens
from mopcompress.errors import NumericalError

_CHUNK = 4096  # tokens whose difference is in memory at a time


class Statistic(Protocol):
    """An accumulator of a layer's inputs; `mean()` is the value that the method's `solve` takes."""

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None: ...

    def mean(self) -> Tensor | None: ...


class NoStatistic:
    """The statistic of methods that use the weights only."""

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Ignore the inputs."""

    def mean(self) -> None:
        """Return None."""


class InputNorms:
    """Root mean square of each input over the calibration tokens.

    Wanda takes the L2 norm, which is larger by a factor sqrt(tokens) for every input, so the masks are the same.
    """

    def __init__(self) -> None:
        self._squares: Tensor | None = None
        self._tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Add a batch of tokens. Raises `NumericalError` when an input is not finite."""
        squares = at_least_float32(inputs).square().sum(0)
        check_finite(squares)
        self._squares = squares if self._squares is None else self._squares + squares
        self._tokens += len(inputs)

    def mean(self) -> Float[Tensor, " in"]:
        """Return the root mean squares. Raises `NumericalError` when there were no tokens."""
        return (require_tokens(self._squares, self._tokens) / self._tokens).sqrt()


def with_ridge(gram: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """Return `gram + damping * mean(diag) I`, the mean over inputs that ever fire; the unit matrix if none does."""
    diagonal = gram.diagonal()
    firing = diagonal[diagonal > 0]
    ridge = damping * firing.mean() if len(firing) else 1.0
    return gram + ridge * torch.eye(len(gram)).to(gram)


def input_shift(inputs: Float[Tensor, "tokens in"], dense: Float[Tensor, "tokens in"]) -> Float[Tensor, "in in"]:
    """Return the mean of (x_dense - x) xᵀ: how far compressing the earlier layers moved a layer's inputs.

    Raises `NumericalError` when an input is not finite.
    """
    inputs = at_least_float32(inputs)
    total = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
    for chunk, dense_chunk in zip(inputs.split(_CHUNK), dense.split(_CHUNK), strict=True):
        total.addmm_((at_least_float32(dense_chunk) - chunk).T, chunk)
    if not bool(total.sum().isfinite()):
        raise NumericalError("the dense model's layer inputs are not finite on the calibration data; use other text")
    return total / len(inputs)


def cross_moment(outputs: Float[Tensor, "tokens out"], inputs: Float[Tensor, "tokens in"]) -> Float[Tensor, "out in"]:
    """Return the mean of y xᵀ. Raises `NumericalError` when an output is not finite."""
    mean = at_least_float32(outputs).T @ at_least_float32(inputs) / len(inputs)
    if not bool(mean.sum().isfinite()):
        raise NumericalError("the dense model's layer outputs are not finite on the calibration data; use other text")
    return mean
