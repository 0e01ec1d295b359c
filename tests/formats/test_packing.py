import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopcompress.formats.packing import (
    GAP_BITS,
    decode_gaps,
    encode_gaps,
    narrowest_gaps,
    pack_bits,
    pack_mask,
    unpack_bits,
    unpack_mask,
)

settings.register_profile("formats", deadline=None)
settings.load_profile("formats")


def packed_by_definition(row, bits):
    """Pack by the definition: one long number, cut into words of 32 bits."""
    number = sum(code << (bits * index) for index, code in enumerate(row))
    words = [(number >> (32 * index)) & 0xFFFFFFFF for index in range(-(-len(row) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def steps_by_definition(mask, bits):
    """Encode by the definition: walk along the mask and count False positions."""
    steps, skipped = [], 0
    for value in mask:
        if value:
            steps.append(skipped)
            skipped = 0
            continue
        skipped += 1
        if skipped == 2**bits - 1:
            steps.append(skipped)
            skipped = 0
    while steps and steps[-1] == 2**bits - 1:  # steps after the last True position
        steps.pop()
    return steps


@st.composite
def codes(draw, bits):
    rows, columns = draw(st.integers(0, 3)), draw(st.integers(0, 70))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.uint8).view(rows, columns)


@pytest.mark.parametrize("bits", range(1, 9))
@given(data=st.data())
@settings(max_examples=30)
def test_packed_codes_are_one_number_and_come_back(bits, data):
    matrix = data.draw(codes(bits))
    words = pack_bits(matrix, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [packed_by_definition(row, bits) for row in matrix.tolist()]
    assert torch.equal(unpack_bits(words, bits, matrix.shape[1]), matrix)


def test_known_words():
    codes = torch.arange(8)[None]
    assert pack_bits(codes, 4).tolist() == [[0x76543210]]
    assert pack_bits(torch.full((1, 4), 255), 8).tolist() == [[-1]]
    assert pack_bits(torch.full((1, 32), 7), 3).tolist() == [[-1, -1, -1]]
    eleventh = torch.zeros(1, 32, dtype=torch.int64)
    eleventh[0, 10] = 0b101  # two low bits end the first word, the high bit begins the second
    assert pack_bits(eleventh, 3).tolist() == [[1 << 30, 1, 0]]


@given(
    rows=st.integers(0, 4),
    columns=st.integers(0, 40),
    seed=st.integers(0, 9),
    fraction=st.sampled_from([0, 0.1, 0.5, 1]),
)
@settings(max_examples=60)
def test_a_packed_mask_has_a_bit_per_position(rows, columns, seed, fraction):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < fraction
    packed = pack_mask(mask)
    expected = [
        [sum(bit << index for index, bit in enumerate(row[first : first + 8])) for first in range(0, columns, 8)]
        for row in mask.tolist()
    ]
    assert packed.shape == (rows, -(-columns // 8))
    assert packed.tolist() == expected
    assert torch.equal(unpack_mask(packed, columns), mask)


@pytest.mark.parametrize("bits", GAP_BITS)
@given(positions=st.sets(st.integers(0, 1500), max_size=30), tail=st.integers(0, 600))
@settings(max_examples=40)
def test_gaps_follow_their_definition_and_come_back(bits, positions, tail):
    mask = torch.zeros(max(positions, default=0) + 1 + tail, dtype=torch.bool)
    mask[list(positions)] = True
    steps = encode_gaps(mask, bits)
    assert steps.tolist() == steps_by_definition(mask.tolist(), bits)
    assert decode_gaps(steps, bits).tolist() == sorted(positions)


@pytest.mark.parametrize("bits", GAP_BITS)
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("times", [1, 2])
def test_gaps_around_the_escape(bits, offset, times):
    escape = 2**bits - 1
    gap = times * escape + offset
    mask = torch.zeros(gap + 1, dtype=torch.bool)
    mask[gap] = True
    assert encode_gaps(mask, bits).tolist() == [escape] * (gap // escape) + [gap % escape]
    assert decode_gaps(encode_gaps(mask, bits), bits).tolist() == [gap]


def test_masks_that_are_all_false_or_all_true():
    for bits in GAP_BITS:
        assert encode_gaps(torch.zeros(300, dtype=torch.bool), bits).tolist() == []
        assert encode_gaps(torch.ones(300, dtype=torch.bool), bits).tolist() == [0] * 300
        assert decode_gaps(torch.empty(0, dtype=torch.uint8), bits).tolist() == []


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.05, 0.15, 0.5, 1.0])
def test_the_narrowest_gaps_are_really_the_narrowest(fraction):
    mask = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) < fraction
    sizes = {bits: bits * len(encode_gaps(mask, bits)) for bits in GAP_BITS}
    width, size = narrowest_gaps(mask)
    assert sizes[width] == size == min(sizes.values())
