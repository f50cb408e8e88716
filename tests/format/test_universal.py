"""The shipped codebooks."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.format import FormatSpec, check_codebooks, encode, sqnr_db, universal_codebooks
from tests.format.cases import codebooks_of, int8

NUMBERS = [1, 2, 4, 8, 16]


@pytest.mark.parametrize("number", NUMBERS)
def test_each_set_fits_the_format(number):
    codebooks = universal_codebooks(number)
    check_codebooks(codebooks, FormatSpec(number, 64))
    assert codebooks.shape == (number, 16)
    assert codebooks.dtype == torch.int8
    assert codebooks.is_contiguous()


@pytest.mark.parametrize("number", NUMBERS)
def test_codebooks_of_a_set_differ_and_reach_both_ends(number):
    codebooks = universal_codebooks(number)
    assert len({tuple(row) for row in codebooks.tolist()}) == number
    # An array's largest scalar is at most 31 in size: sets that stop far short of that would clip every array.
    assert codebooks.min() <= -28
    assert codebooks.max() >= 28


def test_callers_get_their_own_copy():
    universal_codebooks(8).zero_()
    assert universal_codebooks(8).any()


@pytest.mark.parametrize("number", [0, 3, 7, 32, -1])
def test_no_such_set(number):
    with pytest.raises(ValueError, match=rf"no universal set of {number} codebooks: use one of \(1, 2, 4, 8, 16\)"):
        universal_codebooks(number)


def gaussian():
    return torch.randn(256, 512, generator=torch.Generator().manual_seed(0))


def test_more_codebooks_are_more_accurate():
    x = gaussian()
    sqnr = [sqnr_db(x, encode(x, FormatSpec(n, 64), universal_codebooks(n))) for n in NUMBERS]
    assert sqnr == sorted(sqnr)
    assert sqnr[0] > 20  # dB: a 16-level quantizer fitted to a Gaussian alone has 20.2


@pytest.mark.parametrize("number", NUMBERS)
def test_better_than_random_codebooks(number):
    x, spec = gaussian(), FormatSpec(number, 64)
    fitted = sqnr_db(x, encode(x, spec, universal_codebooks(number)))
    assert fitted > sqnr_db(x, encode(x, spec, int8(codebooks_of(0, number)))) + 1
