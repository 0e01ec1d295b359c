"""EoRA: the low-rank matrix that repairs a compressed one best (Liu et al., https://arxiv.org/abs/2410.21271).

The paper takes the singular vectors of (W - W_c) Q L^{1/2}, where S = mean x xᵀ = Q L Qᵀ: SVD_r = U D Vᵀ, and
B A = U D Vᵀ L^{-1/2} Qᵀ. That product is U Uᵀ (W - W_c): the missing outputs, projected on the r directions in which
they have most energy. So only U is needed: the largest eigenvectors of (W - W_c) S (W - W_c)ᵀ. Neither a root of S nor
its inverse is ever formed.

The result is the paper's B A where S is regular. Where S is singular the paper divides by zero; here the same formula
holds. Inputs without energy change no output of the calibration data, and their columns come as near to W as they can.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms.gram import check_gram


def eora(
    dense_weight: Float[Tensor, "out in"],
    compressed_weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    rank: int,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return (B, A) with the least tr((W - W_c - B A) S (W - W_c - B A)ᵀ); both are zero where W_c equals W.

    `rank` is at most the smaller side of the matrix; a larger one raises `ValueError`. Column i of B and row i of A
    have the same norm, so that both fit in fp16; the paper splits the singular values instead, for the same product.
    Costs out * in² multiply-adds and the eigenvectors of a matrix of the smaller side, in float64. With fewer inputs
    than outputs, W - W_c = P R, where P has orthogonal columns, and the eigenvectors are P times those of R S Rᵀ.
    """
    check_gram(gram)
    if not 0 <= rank <= min(dense_weight.shape):
        raise ValueError(f"rank {rank} of a matrix of {len(dense_weight)} x {dense_weight.shape[1]}")
    like = dense_weight
    # float64: some directions of the inputs have a million times the energy of others, which float32 would lose
    device = "cpu" if like.device.type == "mps" else like.device  # MPS has no float64
    missing = (dense_weight - compressed_weight).to(device, torch.float64)
    tall = len(missing) > missing.shape[1]
    basis, core = torch.linalg.qr(missing) if tall else (None, missing)
    energy = core @ gram.to(core) @ core.T
    directions = torch.linalg.eigh(energy).eigenvectors.flip(1)[:, :rank]  # `eigh` returns them in ascending order
    down = directions.T @ core
    up = directions if basis is None else basis @ directions
    size = torch.linalg.vector_norm(down, dim=1).sqrt()
    return (up * size).to(like), (down / torch.where(size > 0, size, 1.0)[:, None]).to(like)
