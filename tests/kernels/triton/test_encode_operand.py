"""Encoding to what the GEMM kernels multiply, against what `lobcq_fx.format` encodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import (
    Encoded,
    FormatSpec,
    Int8Activation,
    absmax_row_scale,
    absmax_tensor_scale,
    encode,
    encode_int8,
    rotate,
)
from lobcq_fx.format.codes import entries_of
from lobcq_fx.format.packing import unpack_codes, unpack_selectors
from lobcq_fx.kernels.triton import encode as encode_module
from lobcq_fx.kernels.triton.encode_operand import encode_operand
from lobcq_fx.kernels.triton.lookup import Lookup
from tests.format.cases import ALL_SPECS, KINDS, matrix
from tests.kernels.triton.operands import DEVICE, assert_same_bits, codebooks
from tests.sweeps import crossed


def entries(encoded: Encoded) -> Tensor:
    """int8 [M, Kp], zeros from K on."""
    codes = unpack_codes(encoded.codes)
    selectors = unpack_selectors(encoded.selectors, encoded.spec.selector_bits, codes.shape[1] // 8)
    result = entries_of(codes, selectors, encoded.codebooks)
    result[:, encoded.columns :] = 0
    return result


def assert_encodes(x: Tensor, spec: FormatSpec, static_scale: Tensor | None = None, rotated: bool = False) -> None:
    """By codebooks and in int8."""
    lookup = Lookup.of(codebooks(spec))
    given = None if static_scale is None else static_scale.expand(x.shape[0], 1)
    y = rotate(x.float(), spec.array_size) if rotated else x
    encoded = encode(y, spec, lookup.codebooks.cpu(), absmax_row_scale(y) if given is None else given)
    assert_encodes_to(x, lookup, spec, static_scale, encoded, entries(encoded), rotated)
    in_int8 = encode_int8(y, spec.array_size, given)
    assert_encodes_to(x, None, spec, static_scale, in_int8, in_int8.entries, rotated)


def assert_encodes_to(
    x: Tensor, lookup: Lookup | None, spec: FormatSpec, static_scale: Tensor | None, encoded: Encoded | Int8Activation,
    values: Tensor, rotated: bool,
) -> None:  # fmt: skip
    static = None if static_scale is None else static_scale.to(DEVICE)
    for integers in (True, False):
        a = encode_operand(x.to(DEVICE), lookup, spec, static, integers, rotated=rotated)
        assert a.row_scales is not None
        assert_same_bits(a.row_scales, encoded.tensor_scale)
        if a.array_scales is not None:
            assert_same_bits(a.values, values)
            scales = a.array_scales.cpu()
            arrays = encoded.scales.shape[1]
            torch.testing.assert_close(scales[:, :arrays], encoded.scales.float(), rtol=0, atol=0, equal_nan=True)
            assert scales.shape[1] == -(-encoded.columns // 128) * 128 // spec.array_size
            assert not bool(scales[x.isfinite().all(dim=1), arrays:].any())
        else:
            per_scalar = encoded.scales.float().repeat_interleave(spec.array_size, dim=1)
            per_scalar[:, encoded.columns :] = 0
            torch.testing.assert_close(a.values.cpu().float(), values * per_scalar, rtol=0, atol=0, equal_nan=True)
            assert a.values.dtype == torch.float16


@pytest.mark.parametrize(("spec", "columns"), crossed(ALL_SPECS, [1, 200]))
def test_every_format(spec: FormatSpec, columns: int) -> None:
    assert_encodes(torch.from_numpy(matrix("normal", 2, columns, seed=columns)), spec)


@pytest.mark.parametrize(("array_size", "columns"), crossed([16, 32, 64, 128], [128, 2304]))
def test_rotated(array_size: int, columns: int) -> None:
    assert_encodes(torch.from_numpy(matrix("heavy", 2, columns, seed=2)), FormatSpec(4, array_size), rotated=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_values_rotated(kind: str) -> None:
    x = torch.from_numpy(matrix(kind, 3, 256, seed=3))
    assert_encodes(x, FormatSpec(), rotated=True)
    assert_encodes(x.bfloat16(), FormatSpec(), rotated=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_values(kind: str) -> None:
    x = torch.from_numpy(matrix(kind, 3, 300, seed=3))
    assert_encodes(x, FormatSpec())
    assert_encodes(x, FormatSpec(), (absmax_tensor_scale(x) / 3).clamp(min=2.0**-149))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    assert_encodes(torch.from_numpy(matrix("heavy", 3, 500, seed=1)).to(dtype), FormatSpec(16, 32))


@pytest.mark.parametrize("spec", [FormatSpec(n, 16) for n in (1, 8)], ids=lambda s: s.name)
def test_small_arrays_are_never_integers(spec: FormatSpec) -> None:
    x = torch.randn(2, 48, device=DEVICE)
    assert encode_operand(x, Lookup.of(codebooks(spec)), spec).values.dtype == torch.float16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_marked(bad: float) -> None:
    x = torch.randn(3, 100)
    x[1, 70] = bad
    assert_encodes(x, FormatSpec())
    assert_encodes(x, FormatSpec(), torch.tensor(0.01))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0)])
def test_empty_operands(shape: tuple[int, int]) -> None:
    assert_encodes(torch.empty(shape).zero_(), FormatSpec())


def test_a_row_shared_by_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "ENOUGH_PROGRAMS", 6)
    assert_encodes(torch.from_numpy(matrix("mixed magnitudes", 2, 4500, seed=4)), FormatSpec())
