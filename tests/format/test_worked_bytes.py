"""Small inputs encoded by hand, every byte explained.

Where nothing else is said: one block array of 16 scalars, t = 1 and absmax 31, so s = 1, and x is in units of entries.
"""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.format import FormatSpec, decode, encode
from tests.format.cases import int8

SPEC = FormatSpec(2, 16)

NARROW = list(range(-8, 8))
"""Entry j is j - 8."""

WIDE = list(range(-31, 0, 2))
"""-31, -29, ..., -1: entry j is 2j - 31."""


def coded(x, codebooks=(NARROW, WIDE)):
    return encode(torch.tensor([x]), SPEC, int8(codebooks), torch.tensor(1.0))


def test_every_byte():
    x = [0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 7.0]  # all in NARROW: error 0, selector 0
    x += [-31.0, -29.0, -27.0, -25.0, -1.0, -3.0, -5.0, -7.0]  # all in WIDE: error 0, selector 1
    encoded = coded(x)
    assert encoded.scales.view(torch.uint8).tolist() == [[0x38]]  # (31 / 31) / 1 = 1.0: exponent 7, mantissa 0
    assert encoded.selectors.tolist() == [[0b10]]  # block 0 in bit 0, block 1 in bit 1, six bits unused
    assert encoded.codes.tolist() == [
        [
            0x98,  # 0 is entry 8 (low nibble), 1 is entry 9 (high nibble)
            0xA7,  # -1 is 7, 2 is 10
            0xB6,  # -2 is 6, 3 is 11
            0xF5,  # -3 is 5, 7 is 15
            0x10,  # -31 is 0, -29 is 1
            0x32,  # -27 is 2, -25 is 3
            0xEF,  # -1 is 15, -3 is 14
            0xCD,  # -5 is 13, -7 is 12
        ]
    ]
    assert decode(encoded).tolist() == [x]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.5, 8),  # q = 8, midway between entries 0 (index 8) and 1 (index 9): the lower index
        (-0.5, 7),  # q = -8, midway between -1 (index 7) and 0 (index 8): the lower index, not the even one
        (0.5625, 9),  # q = 9: one grid step above the midpoint
        (-0.5625, 7),
        (0.53125, 8),  # 16 * 0.53125 = 8.5 rounds to the even 8: the midpoint, hence the lower index
        (0.59375, 9),  # 9.5 rounds to 10
        (-0.53125, 7),  # -8.5 rounds to -8
        (7.5, 15),  # above the highest entry
        (31.0, 15),
        (-8.5, 0),
    ],
)
def test_ties_of_the_entry(value, code):
    x = [value] + [0.0] * 7 + [31.0] + [0.0] * 7
    encoded = coded(x, [NARROW, NARROW])
    assert encoded.codes[0, 0].item() & 0xF == code


def test_repeated_entries_take_the_first_index():
    flat = [-5] * 4 + [3] * 12
    encoded = coded([3.0, -5.0] + [3.0] * 6 + [31.0] * 8, [flat, flat])
    assert encoded.codes[0].tolist() == [0x04, 0x44, 0x44, 0x44, 0x44, 0x44, 0x44, 0x44]


def test_selector_ties_go_to_the_lower_codebook():
    up, down = [*NARROW[:-1], 9], [*NARROW[:-1], 7]
    x = [8.0] * 8 + [31.0] + [0.0] * 7  # 8 is 1 away from 9 and from 7: both codebooks err by 8 * 16**2
    assert coded(x, [up, down]).selectors.tolist() == [[0b00]]
    assert coded(x, [down, up]).selectors.tolist() == [[0b10]]  # the block with 31 prefers 9 in both orders
    assert decode(coded(x, [up, down]))[0, 0] == 9
    assert decode(coded(x, [down, up]))[0, 0] == 7


@pytest.mark.parametrize(("fourth", "selector"), [(407, 0), (406, 1)])
def test_clamp_at_2047_decides_the_selector(fourth, selector):
    """With t = 1 the scale of these large values saturates at 448, so x = 28 q is q grid steps; 5000 becomes 2047.

    Cost in codebook 0 (only 31, 496 steps) less the cost in codebook 1 (0 and 20, 320 steps):
        2047:  (2047 - 496)^2 - (2047 - 320)^2 = -576928
         -42:  (42 + 496)^2 - 42^2             =  287680
         -43:  (43 + 496)^2 - 43^2             =  288672
         407:  (407 - 496)^2 - (407 - 320)^2   =     352, and 704 for 406, 0 for 408
    In all -224 with 407 and +128 with 406. A clamp at 2046 would add 352, one at 2048 take 352 away: either turns one
    of the two choices, and without a clamp codebook 0 wins both.
    """
    steps = [5000, -42, -43, fourth, 408, 408, 408, 408]
    encoded = coded([28.0 * q for q in steps * 2], [[31] * 16, [0] * 15 + [20]])
    assert encoded.scales.float().tolist() == [[448.0]]
    assert encoded.selectors.tolist() == [[0b11 * selector]]


def test_smallest_scale_and_zero_scale():
    tiny = encode(torch.tensor([[1e-6] + [0.0] * 15]), SPEC, int8([NARROW] * 2), torch.tensor(1.0))
    assert tiny.scales.view(torch.uint8).tolist() == [[0x01]]  # 3e-8 rounds to 0, so the smallest: 2**-9
    zero = encode(torch.zeros(1, 16), SPEC, int8([NARROW] * 2), torch.tensor(1.0))
    assert zero.scales.view(torch.uint8).tolist() == [[0x00]]
    assert zero.codes.tolist() == [[0x88] * 8]  # q = 0, entry 0 is index 8


def test_zero_array_codes_the_entry_nearest_to_zero():
    no_zero = [-20, -9, -7, -5, -3, -2, -1, 1, 2, 3, 5, 7, 9, 11, 20, 31]
    encoded = encode(torch.zeros(1, 16), SPEC, int8([no_zero] * 2))
    assert encoded.codes.tolist() == [[0x66] * 8]  # -1 (index 6) and 1 (index 7) tie: the lower index
    assert encoded.tensor_scale.item() == 1
    assert torch.equal(decode(encoded), torch.zeros(1, 16))


def test_three_bit_selectors_straddle_bytes():
    """Codebook k holds only the value 4k + 3, so a block of that value takes selector k."""
    codebooks = [[4 * k + 3] * 16 for k in range(8)]
    wanted = [7, 0, 5, 2, 1, 6, 3, 4]
    x = [4.0 * k + 3 for k in wanted for _ in range(8)]
    encoded = encode(torch.tensor([x]), FormatSpec(8, 64), int8(codebooks), torch.tensor(1.0))
    # From the top: 100 011 110 001 010 101 000 111 = 1000_1111 0001_0101 0100_0111, stored low byte first.
    assert encoded.selectors.tolist() == [[0b01000111, 0b00010101, 0b10001111]]


def test_rows_start_on_a_byte():
    """Two blocks a row and 3 bits each: 6 bits used, 2 left zero, in each of the two rows."""
    codebooks = [[4 * k + 3] * 16 for k in range(8)]
    x = torch.tensor([[11.0] * 8 + [31.0] * 8, [31.0] * 16])
    encoded = encode(x, FormatSpec(8, 16), int8(codebooks), torch.tensor(1.0))
    assert encoded.selectors.tolist() == [[0b00_111_010], [0b00_111_111]]
