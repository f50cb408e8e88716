"""NaN and infinity: refused in a weight, confined to a row or a block array in an activation."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, universal_codebooks
from tests.format.cases import codebooks_of, matrix, same_bytes

NAN_BYTE = 0x7F
SPEC = FormatSpec(8, 64)
BAD = (float("nan"), float("inf"), float("-inf"))


def activation(value, dtype=torch.float32):
    x = torch.from_numpy(matrix("normal", 5, 200, seed=1)).to(dtype)
    x[2, 130] = value
    return x


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weight_is_refused_with_its_first_bad_index(value, dtype):
    x = activation(value, dtype)
    x[4, 0] = float("nan")
    with pytest.raises(ValueError, match=r"x\[2, 130\] is (nan|-?inf): a weight must be finite"):
        encode(x, SPEC, universal_codebooks(8))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_row_scale_makes_the_whole_row_nan_and_no_other(value, dtype):
    x = activation(value, dtype)
    clean = activation(0.5, dtype)
    encoded = encode(x, SPEC, universal_codebooks(8), absmax_row_scale(x))
    reference = encode(clean, SPEC, universal_codebooks(8), absmax_row_scale(clean))
    others = [0, 1, 3, 4]
    assert encoded.tensor_scale.isnan().flatten().tolist() == [False, False, True, False, False]
    assert encoded.scales[2].view(torch.uint8).tolist() == [NAN_BYTE] * 4
    assert decode(encoded)[2].isnan().all()
    for field in ("codes", "selectors"):
        assert torch.equal(getattr(encoded, field)[others], getattr(reference, field)[others])
    assert torch.equal(decode(encoded)[others], decode(reference)[others])


@pytest.mark.parametrize("value", BAD)
def test_a_finite_row_scale_given_for_a_bad_row_becomes_nan(value):
    x = activation(value)
    encoded = encode(x, SPEC, universal_codebooks(8), torch.full((5, 1), 1e-3))
    assert encoded.tensor_scale.isnan().flatten().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("value", BAD)
def test_static_scale_makes_the_block_array_nan_and_no_other(value):
    x = activation(value)
    encoded = encode(x, SPEC, universal_codebooks(8), torch.tensor(1e-3))
    marked = encoded.scales.view(torch.uint8) == NAN_BYTE
    assert marked.nonzero().tolist() == [[2, 2]]
    nan = decode(encoded).isnan()
    assert nan[2, 128:192].all()
    assert nan.sum() == 64


def test_codes_of_a_bad_row_are_defined():
    """A bad array is coded as if it were zero, so the bytes do not depend on what NaN converts to."""
    zero_codes = encode(torch.zeros(1, 64), SPEC, universal_codebooks(8)).codes
    x = torch.full((1, 64), float("nan"))
    for scale in (torch.tensor(1.0), absmax_row_scale(x)):
        assert torch.equal(encode(x, SPEC, universal_codebooks(8), scale).codes, zero_codes)


@pytest.mark.parametrize("magnitude", [2.0**-149, 1e-44, 3e-44, 1e-42, 1e-40])
def test_a_finite_input_never_decodes_to_nan(magnitude):
    """absmax / 13888 underflows to 0 here, and absmax / 31 with it: 0 / 0 must not reach the scale."""
    x = torch.full((1, 64), magnitude)
    for scale in (None, absmax_row_scale(x)):
        encoded = same_bytes(x, SPEC, codebooks_of(0, 8), scale)
        assert decode(encoded).isfinite().all()
