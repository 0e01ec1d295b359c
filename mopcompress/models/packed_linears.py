"""Linears that compute from packed or sparse weights. They serve inference only: their weights cannot be trained.

`SparseLinear` multiplies the non-zero weights alone, with `torch.sparse_csr`, on CPUs. It is faster than the dense
product at 95 % sparsity and slower at 50 %; the more tokens are computed at once, the higher the sparsity at which it
pays. `benchmarks/csr_runtime.py` measures both.
"""

import warnings

from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.algorithms.solution import LowRankFactors
from mopcompress.models.repair import add_repair, repair_of


class SparseLinear(nn.Module):
    """An `nn.Linear` computed from its non-zero weights: equal to it up to the order of summation."""

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.register_buffer("weight", linear.weight.detach().to_sparse_csr(), persistent=False)
        self.bias = linear.bias

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        rows = inputs.reshape(-1, self.in_features)
        outputs = (self.weight @ rows.T).T
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], self.out_features)


def use_sparse_linears(network: nn.Module, *, sparsity: float) -> int:
    """Replace, in place, every `nn.Linear` with at least this fraction of zeros, and return their number."""
    linears = {
        name: module
        for name, module in network.named_modules()
        if type(module) is nn.Linear and float((module.weight == 0).float().mean()) >= sparsity
    }
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        sparse, repair = SparseLinear(linear), repair_of(linear)
        if repair is not None:
            add_repair(sparse, LowRankFactors(repair.up, repair.down))
        setattr(network.get_submodule(parent), child, sparse)
    return len(linears)
