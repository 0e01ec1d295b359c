"""Small integers, masks and distances as bits. Bits fill bytes, and bytes words, from the least significant up.

Every function is pure and has an inverse; nothing here knows what the numbers mean.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32, Integer, UInt8
from torch import Tensor

GAP_BITS = range(3, 9)  # widths that a stream of gaps may have


def pack_bits(codes: Integer[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """Codes from 0 to 2^bits - 1, each `bits` wide, back to back along a row without regard to word borders.

    So 8 codes of 4 bits fill a word and 32 codes of 3 bits fill three. The last word of a row is filled up with zeros.
    """
    rows, columns = codes.shape
    planes = np.unpackbits(codes.to(torch.uint8).numpy()[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(planes.reshape(rows, columns * bits), axis=-1, bitorder="little")
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(padded.view("<i4").astype(np.int32))


def unpack_bits(words: Int32[Tensor, "rows words"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """The first `columns` codes of each row."""
    packed = np.ascontiguousarray(words.numpy().astype("<i4")).view(np.uint8)
    planes = np.unpackbits(packed, axis=-1, count=columns * bits, bitorder="little")
    codes = np.packbits(planes.reshape(-1, bits), axis=-1, bitorder="little")
    return torch.from_numpy(codes.reshape(len(words), columns))


def pack_mask(mask: Bool[Tensor, "rows columns"]) -> UInt8[Tensor, "rows bytes"]:
    """One bit a place; each row begins a byte of its own."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def unpack_mask(packed: UInt8[Tensor, "rows bytes"], columns: int) -> Bool[Tensor, "rows columns"]:
    """The first `columns` places of each row."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=columns, bitorder="little").astype(bool))


def gaps_of(mask: Bool[Tensor, " places"], bits: int) -> UInt8[Tensor, " steps"]:
    """The distances between True places, as steps of `bits` bits; `bits` must be one of `GAP_BITS`.

    A step below E = 2^bits - 1 passes so many False places and then stands on a True one. The step E passes E False
    places and stands on none: the next step goes on from there. False places after the last True one are left out.
    """
    escape = 2**bits - 1
    gaps = _gaps(mask)
    escapes = gaps // escape
    steps = torch.full((len(gaps) + int(escapes.sum()),), escape, dtype=torch.uint8)
    steps[(escapes + 1).cumsum(0) - 1] = (gaps % escape).to(torch.uint8)
    return steps


def places_of(steps: UInt8[Tensor, " steps"], bits: int) -> Int[Tensor, " count"]:
    """Where the True places are, in ascending order: the inverse of `gaps_of`."""
    escape = 2**bits - 1
    stands = steps < escape
    return (steps.long() + stands).cumsum(0)[stands] - 1


def narrowest_gaps(mask: Bool[Tensor, " places"]) -> tuple[int, int]:
    """The width of `GAP_BITS` whose steps take the fewest bits in all, and how many bits those are."""
    gaps = _gaps(mask)
    sizes = {bits: bits * (len(gaps) + int((gaps // (2**bits - 1)).sum())) for bits in GAP_BITS}
    return min(sizes.items(), key=lambda item: item[1])


def _gaps(mask: Bool[Tensor, " places"]) -> Int[Tensor, " count"]:
    places = mask.nonzero().squeeze(1)
    return places.diff(prepend=places.new_tensor([-1])) - 1
