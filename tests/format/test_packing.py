"""The layout at rest: nibbles and bit strings against Python's own integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobcq_fx.format.packing import pack_codes, pack_selectors, unpack_codes, unpack_selectors
from tests.format import oracle
from tests.format.cases import PROPERTY


def test_nibbles_by_hand():
    codes = torch.tensor([[0x1, 0x2, 0xF, 0x0], [0x0, 0xF, 0xA, 0xB]], dtype=torch.uint8)
    assert pack_codes(codes).tolist() == [[0x21, 0x0F], [0xF0, 0xBA]]  # scalar 0 low, scalar 1 high


@pytest.mark.parametrize(
    ("bits", "selectors", "packed"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 1], [0b00000001, 0b1]),
        (2, [3, 0, 1, 2], [0b10_01_00_11]),
        (2, [3], [0b11]),
        (3, [1, 2, 4], [0b00_010_001, 0b1]),  # the third selector, 100: two bits in byte 0, its top bit in byte 1
        (3, [7, 0, 5, 2, 1, 6, 3, 4], [0b01_000_111, 0b0_001_010_1, 0b100_011_11]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (0, [0, 0, 0], []),
    ],
)
def test_selectors_by_hand(bits, selectors, packed):
    tensor = torch.tensor([selectors], dtype=torch.uint8)
    assert pack_selectors(tensor, bits).tolist() == [packed]
    assert unpack_selectors(torch.tensor([packed], dtype=torch.uint8), bits, len(selectors)).tolist() == [selectors]


def test_every_byte_of_codes_round_trips():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_codes(unpack_codes(packed)), packed)
    assert unpack_codes(packed).max() == 15


@PROPERTY
@given(bits=st.integers(0, 4), rows=st.integers(0, 4), blocks=st.integers(0, 40), data=st.data())
def test_any_selectors(bits, rows, blocks, data):
    row = st.lists(st.integers(0, (1 << bits) - 1), min_size=blocks, max_size=blocks)
    values = data.draw(st.lists(row, min_size=rows, max_size=rows))
    selectors = torch.tensor(values, dtype=torch.uint8).view(rows, blocks)
    packed = pack_selectors(selectors, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [oracle.pack_bits(v, bits) for v in values]
    assert torch.equal(unpack_selectors(packed, bits, blocks), selectors)


@PROPERTY
@given(rows=st.integers(0, 4), pairs=st.integers(0, 40), data=st.data())
def test_any_codes(rows, pairs, data):
    row = st.lists(st.integers(0, 15), min_size=2 * pairs, max_size=2 * pairs)
    values = data.draw(st.lists(row, min_size=rows, max_size=rows))
    codes = torch.tensor(values, dtype=torch.uint8).view(rows, 2 * pairs)
    packed = pack_codes(codes)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [oracle.pack_nibbles(v) for v in values]
    assert torch.equal(unpack_codes(packed), codes)


def test_unused_bits_of_the_last_byte_are_zero_and_not_read():
    selectors = torch.tensor([[5, 6]], dtype=torch.uint8)
    packed = pack_selectors(selectors, 3)
    assert packed.tolist() == [[0b00_110_101]]
    assert torch.equal(unpack_selectors(packed | 0b11_000_000, 3, 2), selectors)
