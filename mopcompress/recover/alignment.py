"""Where low-rank paths begin to look: along the loss's gradient (LoRA-GA, Wang et al., 2024, arXiv 2407.05000).

With y = W x + B A x, training begins with B = 0, so that nothing changes yet, and the first gradient that B sees is
G Aᵀ, where G is the loss's gradient of W. A random A of rank 1 catches next to nothing of G; G's leading right singular
vectors catch most of what any A of that rank can. One round of subspace iteration finds them, through the paths
themselves, so that no gradient of a weight is ever in memory (ours):

    Q = orthonormal(G Aᵀ),    A = orthonormal(Gᵀ Q)ᵀ

where A was random, and both products are the paths' own gradients: of B at B = 0, and of A at A = 0, B = Q. LoRA-GA
takes all of G, begins with B along its left vectors too, and takes B A out of W in return; here B ends at 0.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.errors import NumericalError

Losses = Callable[[], Iterable[Float[Tensor, ""]]]
"""The losses of some batches, computed anew at each call: the paths are other ones then."""


@dataclass(frozen=True)
class Path:
    """The two factors of one low-rank path; without its `up` it does nothing."""

    down: nn.Parameter  # A, [rank, columns]
    up: nn.Parameter  # B, [rows, rank]


@torch.no_grad()
def align(paths: Sequence[Path], losses: Losses) -> None:
    """Turn every `down`, in place, to the inputs that the gradient has most of, and set every `up` to zero.

    Two backward passes over the batches. A path that no batch reaches keeps its `down`. Raises `NumericalError` when
    the gradient is not finite.
    """
    drawn = [path.down.clone() for path in paths]
    for path in paths:
        path.up.zero_()
    outputs = _gradients([path.up for path in paths], losses)
    for path, output in zip(paths, outputs, strict=True):
        path.up.copy_(_orthonormal(output))
        path.down.zero_()
    inputs = _gradients([path.down for path in paths], losses)
    for path, own, found in zip(paths, drawn, inputs, strict=True):
        path.down.copy_(_orthonormal(found.T).T if found.any() else own)
        path.up.zero_()


def _gradients(factors: Sequence[nn.Parameter], losses: Losses) -> list[Tensor]:
    """The sum over batches of the gradient of each factor."""
    total = [torch.zeros_like(factor) for factor in factors]
    with torch.enable_grad():
        for loss in losses():
            for summed, one in zip(total, torch.autograd.grad(loss, factors, materialize_grads=True), strict=True):
                summed += one
    if not all(bool(one.isfinite().all()) for one in total):
        raise NumericalError(
            "the training rows' loss has no finite gradient before the first step; the model is broken"
        )
    return total


def _orthonormal(columns: Float[Tensor, "size rank"]) -> Float[Tensor, "size rank"]:
    return torch.linalg.qr(columns)[0]
