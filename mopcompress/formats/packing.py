"""Small integers, masks and gaps as bits. Bits fill bytes, and bytes fill words, from the least significant up.

Every pair of functions packs and unpacks exactly; nothing here depends on the meaning of the numbers.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32, Integer, UInt8
from torch import Tensor

GAP_BITS = range(3, 9)  # possible widths of the steps of a stream of gaps, in bits


def pack_bits(codes: Integer[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """Pack codes from 0 to 2^bits - 1, each `bits` wide, back to back along a row and across borders of words.

    So 8 codes of 4 bits fill a word and 32 codes of 3 bits fill three. Zeros fill the rest of the last word of a row.
    """
    rows, columns = codes.shape
    planes = np.unpackbits(codes.to(torch.uint8).numpy()[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(planes.reshape(rows, columns * bits), axis=-1, bitorder="little")
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(padded.view("<i4").astype(np.int32))


def unpack_bits(words: Int32[Tensor, "rows words"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """Return the first `columns` codes of each row."""
    packed = np.ascontiguousarray(words.numpy().astype("<i4")).view(np.uint8)
    planes = np.unpackbits(packed, axis=-1, count=columns * bits, bitorder="little")
    codes = np.packbits(planes.reshape(-1, bits), axis=-1, bitorder="little")
    return torch.from_numpy(codes.reshape(len(words), columns))


def pack_mask(mask: Bool[Tensor, "rows columns"]) -> UInt8[Tensor, "rows bytes"]:
    """Pack a mask into one bit per position; each row begins a new byte."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def unpack_mask(packed: UInt8[Tensor, "rows bytes"], columns: int) -> Bool[Tensor, "rows columns"]:
    """Return the first `columns` positions of each row."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=columns, bitorder="little").astype(bool))


def encode_gaps(mask: Bool[Tensor, " positions"], bits: int) -> UInt8[Tensor, " steps"]:
    """Return the gaps between True positions, as steps of `bits` bits; `bits` must be one of `GAP_BITS`.

    A step below E = 2^bits - 1 skips that many False positions and ends on a True one. The step E skips E False
    positions and ends on none: the next step continues from there. False positions after the last True one are omitted.
    """
    escape = 2**bits - 1
    gaps = _gaps(mask)
    escapes = gaps // escape
    steps = torch.full((len(gaps) + int(escapes.sum()),), escape, dtype=torch.uint8)
    steps[(escapes + 1).cumsum(0) - 1] = (gaps % escape).to(torch.uint8)
    return steps


def decode_gaps(steps: UInt8[Tensor, " steps"], bits: int) -> Int[Tensor, " count"]:
    """Return the True positions in ascending order: the inverse of `encode_gaps`."""
    escape = 2**bits - 1
    ends_on_true = steps < escape
    return (steps.long() + ends_on_true).cumsum(0)[ends_on_true] - 1


def narrowest_gaps(mask: Bool[Tensor, " positions"]) -> tuple[int, int]:
    """Return the width of `GAP_BITS` whose steps take the fewest bits in all, and that number of bits."""
    gaps = _gaps(mask)
    sizes = {bits: bits * (len(gaps) + int((gaps // (2**bits - 1)).sum())) for bits in GAP_BITS}
    return min(sizes.items(), key=lambda item: item[1])


def _gaps(mask: Bool[Tensor, " positions"]) -> Int[Tensor, " count"]:
    positions = mask.nonzero().squeeze(1)
    return positions.diff(prepend=positions.new_tensor([-1])) - 1
