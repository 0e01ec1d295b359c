"""Formats: how the tensors of a dense folder are stored, so that they come back as they were.

packing              small integers, masks and distances as bits
gptq_v1              loads with transformers + gptqmodel, and with GPTQModel.load
compressed_tensors   loads with transformers + compressed-tensors
sparse               ours: where the weights are, and the weights
folder               a folder in any of them, tensor by tensor
runtime              linears that compute from their survivors alone
"""

from mopcompress.formats import compressed_tensors, gptq, sparse
from mopcompress.formats.weight_format import DENSE, WeightFormat

LAYOUTS: dict[str, WeightFormat] = {
    "dense": DENSE,
    "gptq": gptq.FORMAT,
    "compressed-tensors": compressed_tensors.FORMAT,
    "sparse": sparse.FORMAT,
}

__all__ = ["LAYOUTS", "Layout"]
