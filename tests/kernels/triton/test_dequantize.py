"""Decoding: every bit against `lobcq_fx.format`."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, scaled_entries
from lobcq_fx.kernels.triton.dequantize import dequantize
from tests.format.cases import EVERY_SPEC, KINDS, matrix
from tests.kernels.triton.operands import DEVICE, assert_same_bits, codebooks, parts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda s: s.name)
@pytest.mark.parametrize("columns", [1, 1070])
def test_every_format(spec: FormatSpec, columns: int) -> None:
    """In 8x16 the last selector of 1070 columns straddles the last two bytes."""
    books = codebooks(spec)
    x = torch.from_numpy(matrix("normal", 3, columns, seed=columns))
    for scale in (None, absmax_row_scale(x)):
        encoded = encode(x, spec, books.cpu(), scale)
        out = dequantize(*parts(encoded), encoded.tensor_scale.to(DEVICE), books, spec, columns, torch.float32)
        assert_same_bits(out, decode(encoded))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_values(kind: str, dtype: torch.dtype) -> None:
    spec, x = FormatSpec(), torch.from_numpy(matrix(kind, 3, 200, seed=3))
    encoded = encode(x, spec, codebooks(spec).cpu())
    scale = encoded.tensor_scale.to(DEVICE)
    out = dequantize(*parts(encoded), scale, codebooks(spec), spec, 200, dtype)
    assert_same_bits(out, decode(encoded).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_the_tensor_scale_it_is_exact_in_fp16_too(dtype: torch.dtype) -> None:
    spec, x = FormatSpec(16, 32), torch.from_numpy(matrix("mixed magnitudes", 4, 500, seed=3))
    encoded = encode(x, spec, codebooks(spec).cpu())
    out = dequantize(*parts(encoded), None, codebooks(spec), spec, 500, dtype)
    assert torch.equal(out.float().cpu(), scaled_entries(encoded))


def test_a_marked_row_decodes_to_nan() -> None:
    spec, x = FormatSpec(), torch.randn(3, 100)
    x[1, 70] = torch.inf
    encoded = encode(x, spec, codebooks(spec).cpu(), absmax_row_scale(x))
    for scale in (encoded.tensor_scale.to(DEVICE), None):
        out = dequantize(*parts(encoded), scale, codebooks(spec), spec, 100, torch.float32)
        assert out.isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 64), (2, 0)])
def test_empty_operands(shape: tuple[int, int]) -> None:
    spec = FormatSpec()
    encoded = encode(torch.zeros(shape), spec, codebooks(spec).cpu())
    assert dequantize(*parts(encoded), None, codebooks(spec), spec, shape[1], torch.float16).shape == shape
