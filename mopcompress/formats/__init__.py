"""Formats of weight files: each stores the tensors of a dense folder so that they come back exactly.

weight_format        the functions that make up a format, and the dense format
gptq                 loads with transformers + gptqmodel, and with GPTQModel.load
compressed_tensors   loads with transformers + compressed-tensors
sparse               our container: positions and values of the non-zero weights
packing              small integers, masks and gaps as bits
model_reader         a folder in any of these formats, tensor by tensor
"""

from mopcompress.formats import compressed_tensors, gptq, sparse
from mopcompress.formats.weight_format import DENSE, WeightFormat

FORMATS: dict[str, WeightFormat] = {
    "dense": DENSE,
    "gptq": gptq.FORMAT,
    "compressed-tensors": compressed_tensors.FORMAT,
    "sparse": sparse.FORMAT,
}

__all__ = ["FORMATS", "WeightFormat"]
