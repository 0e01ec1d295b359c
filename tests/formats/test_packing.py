import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopcompress.formats.packing import (
    GAP_BITS,
    gaps_of,
    narrowest_gaps,
    pack_bits,
    pack_mask,
    places_of,
    unpack_bits,
    unpack_mask,
)

settings.register_profile("formats", deadline=None)
settings.load_profile("formats")


def packed_slowly(row, bits):
    """The definition: one long number, cut into words of 32 bits."""
    number = sum(code << (bits * index) for index, code in enumerate(row))
    words = [(number >> (32 * index)) & 0xFFFFFFFF for index in range(-(-len(row) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def steps_slowly(mask, bits):
    """The definition: walk along, count what is passed."""
    steps, passed = [], 0
    for place in mask:
        if place:
            steps.append(passed)
            passed = 0
            continue
        passed += 1
        if passed == 2**bits - 1:
            steps.append(passed)
            passed = 0
    while steps and steps[-1] == 2**bits - 1:  # what leads nowhere
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
def test_packed_codes_are_one_long_number_and_come_back(bits, data):
    matrix = data.draw(codes(bits))
    words = pack_bits(matrix, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [packed_slowly(row, bits) for row in matrix.tolist()]
    assert torch.equal(unpack_bits(words, bits, matrix.shape[1]), matrix)


def test_known_words():
    eight = torch.arange(8)[None]
    assert pack_bits(eight, 4).tolist() == [[0x76543210]]
    assert pack_bits(torch.full((1, 4), 255), 8).tolist() == [[-1]]
    assert pack_bits(torch.full((1, 32), 7), 3).tolist() == [[-1, -1, -1]]
    eleventh = torch.zeros(1, 32, dtype=torch.int64)
    eleventh[0, 10] = 0b101  # its two low bits end the first word, its high bit begins the second
    assert pack_bits(eleventh, 3).tolist() == [[1 << 30, 1, 0]]


@given(
    rows=st.integers(0, 4), columns=st.integers(0, 40), seed=st.integers(0, 9), share=st.sampled_from([0, 0.1, 0.5, 1])
)
@settings(max_examples=60)
def test_a_packed_mask_is_a_bit_a_place_and_comes_back(rows, columns, seed, share):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    packed = pack_mask(mask)
    slow = [
        [sum(bit << index for index, bit in enumerate(row[first : first + 8])) for first in range(0, columns, 8)]
        for row in mask.tolist()
    ]
    assert packed.shape == (rows, -(-columns // 8))
    assert packed.tolist() == slow
    assert torch.equal(unpack_mask(packed, columns), mask)


@pytest.mark.parametrize("bits", GAP_BITS)
@given(places=st.sets(st.integers(0, 1500), max_size=30), tail=st.integers(0, 600))
@settings(max_examples=40)
def test_gaps_follow_their_definition_and_come_back(bits, places, tail):
    mask = torch.zeros(max(places, default=0) + 1 + tail, dtype=torch.bool)
    mask[list(places)] = True
    steps = gaps_of(mask, bits)
    assert steps.tolist() == steps_slowly(mask.tolist(), bits)
    assert places_of(steps, bits).tolist() == sorted(places)


@pytest.mark.parametrize("bits", GAP_BITS)
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("times", [1, 2])
def test_gaps_about_the_escape(bits, offset, times):
    escape = 2**bits - 1
    gap = times * escape + offset
    mask = torch.zeros(gap + 1, dtype=torch.bool)
    mask[gap] = True
    assert gaps_of(mask, bits).tolist() == [escape] * (gap // escape) + [gap % escape]
    assert places_of(gaps_of(mask, bits), bits).tolist() == [gap]


def test_no_place_at_all_and_every_place():
    for bits in GAP_BITS:
        assert gaps_of(torch.zeros(300, dtype=torch.bool), bits).tolist() == []
        assert gaps_of(torch.ones(300, dtype=torch.bool), bits).tolist() == [0] * 300
        assert places_of(torch.empty(0, dtype=torch.uint8), bits).tolist() == []


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.15, 0.5, 1.0])
def test_the_narrowest_gaps_are_really_the_narrowest(share):
    mask = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) < share
    sizes = {bits: bits * len(gaps_of(mask, bits)) for bits in GAP_BITS}
    width, size = narrowest_gaps(mask)
    assert sizes[width] == size == min(sizes.values())
