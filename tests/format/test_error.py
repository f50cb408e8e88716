"""sqnr_db against the definition in doubles."""

from __future__ import annotations

import math

import pytest
import torch

from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, sqnr_db, universal_codebooks
from tests.format.cases import matrix

SPEC = FormatSpec(8, 64)


def coded(x, scale=None):
    return encode(x, SPEC, universal_codebooks(8), scale)


@pytest.mark.parametrize("shape", [(1, 9), (3, 100), (700, 1000)])
@pytest.mark.parametrize("rule", ["weight", "row"])
def test_definition(shape, rule):
    """[700, 1000] takes three chunks. Distances are rounded to fp32, which moves what is printed by nothing."""
    x = torch.from_numpy(matrix("heavy", *shape, seed=0))
    encoded = coded(x, absmax_row_scale(x) if rule == "row" else None)
    noise = (x.double() - decode(encoded).double()).square().sum()
    expected = 10 * math.log10(x.double().square().sum() / noise)
    assert sqnr_db(x, encoded) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_squares_that_fp32_does_not_hold_count(size):
    x = torch.from_numpy(matrix("normal", 3, 100, seed=0)).float()
    encoded = coded(x * size)
    noise = ((x * size).double() - decode(encoded).double()).square().sum()
    expected = 10 * math.log10((x * size).double().square().sum() / noise)
    assert sqnr_db(x * size, encoded) == pytest.approx(expected, abs=2e-6)


def test_exact_code_is_infinite():
    x = torch.zeros(2, 64)
    x[:, 5] = 31.0
    x = decode(coded(x, torch.tensor(1.0)))
    encoded = coded(x, torch.tensor(1.0))
    assert torch.equal(decode(encoded), x)
    assert sqnr_db(x, encoded) == math.inf


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (3, 64)])
def test_nothing_to_code_is_nan(shape):
    x = torch.zeros(shape)
    assert math.isnan(sqnr_db(x, coded(x)))


def test_half_precision_operand():
    x = torch.from_numpy(matrix("normal", 4, 100, seed=0)).bfloat16()
    assert sqnr_db(x, coded(x)) == sqnr_db(x.float(), coded(x.float()))


def test_eight_codebooks_and_64_on_a_gaussian():
    """Within 3.1 dB of what no code of 4.5 bits a scalar can pass, 20 log10(2^4.5) = 27.1 dB."""
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    assert 24 < sqnr_db(x, coded(x)) < 27.1
