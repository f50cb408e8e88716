"""Encoding: every byte against `lobcq_fx.format`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, absmax_row_scale, absmax_tensor_scale, encode
from lobcq_fx.kernels.triton import encode as encode_module
from lobcq_fx.kernels.triton.encode import encode_rows
from lobcq_fx.kernels.triton.lookup import Lookup
from tests.format.cases import ALL_SPECS, KINDS, matrix
from tests.format.test_golden_vectors import golden_file
from tests.kernels.triton.operands import DEVICE, assert_same_bits, assert_same_bytes, codebooks
from tests.sweeps import crossed

NAN = 0x7F


def assert_encodes(x: Tensor, spec: FormatSpec, static_scale: Tensor | None = None) -> None:
    books = codebooks(spec)
    static = None if static_scale is None else static_scale.to(DEVICE)
    actual = encode_rows(x.to(DEVICE), Lookup.of(books), spec, static)
    scale = absmax_row_scale(x) if static_scale is None else static_scale.expand(x.shape[0], 1)
    assert_same_bytes(actual, encode(x, spec, books.cpu(), scale))


@pytest.mark.parametrize(("spec", "columns"), crossed(ALL_SPECS, [1, 200]))
def test_every_format(spec: FormatSpec, columns: int) -> None:
    assert_encodes(torch.from_numpy(matrix("normal", 2, columns, seed=columns)), spec)


def test_golden_vectors() -> None:
    """Bytes that neither this kernel nor the package produced."""
    with np.load(golden_file()) as data:
        fields = {name: data[name] for name in data.files}
    for case in sorted({name.split("/")[0] for name in fields}):
        x, books, scale = (torch.from_numpy(fields[f"{case}/{name}"]) for name in ("x", "codebooks", "tensor_scale"))
        spec = FormatSpec(books.shape[0], int(fields[f"{case}/array_size"]))
        static = scale.to(DEVICE) if scale.dim() == 0 else None
        actual = encode_rows(x.to(DEVICE), Lookup.of(books.to(DEVICE)), spec, static)
        for part, name in zip(actual, ("codes", "selectors", "scales"), strict=False):
            assert np.array_equal(part.view(torch.uint8).cpu().numpy(), fields[f"{case}/{name}"]), (case, name)
        assert_same_bits(actual[3], scale.repeat(x.shape[0], 1) if scale.dim() == 0 else scale)


@pytest.mark.parametrize("spec", [FormatSpec(8, 64), FormatSpec(16, 16), FormatSpec(1, 128)], ids=lambda s: s.name)
def test_several_tiles(spec: FormatSpec) -> None:
    assert_encodes(torch.from_numpy(matrix("normal", 2, 2300, seed=1)), spec)


@pytest.mark.parametrize(("kind", "spec"), crossed(KINDS, [FormatSpec(8, 64), FormatSpec(16, 16)]))
def test_every_kind_of_values(kind: str, spec: FormatSpec) -> None:
    x = torch.from_numpy(matrix(kind, 2, 300, seed=3))
    for static in (None, (absmax_tensor_scale(x) / 3).clamp(min=2.0**-149)):
        assert_encodes(x, spec, static)


@pytest.mark.parametrize("factor", [0.9, 0.5, 0.2, 1e-3, 1e-30])
def test_a_static_scale_far_too_small_saturates_exactly(factor: float) -> None:
    """Grid values up to the clamp of 2047, and quotients that overflow."""
    x = torch.from_numpy(matrix("heavy", 3, 512, seed=5))
    assert_encodes(x, FormatSpec(16, 64), absmax_tensor_scale(x) * factor)


def test_every_ratio_between_two_scales_rounds_as_e4m3_does() -> None:
    """A static scale of 1 / 31, so that an array's absmax is the number that becomes E4M3: all there are, and ties."""
    steps = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = torch.cat((steps, (steps[1:] + steps[:-1]) / 2))
    near = torch.cat((between, between * (1 + 2**-22), between * (1 - 2**-22), torch.tensor([2.0**-11, 500.0, 1e30])))
    x = torch.zeros(near.numel(), 16)
    x[:, 3] = near
    assert_encodes(x.reshape(6, -1), FormatSpec(2, 16), torch.tensor(1 / 31))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = torch.where(every.isfinite(), every, 0).view(16, 4096)
    assert_encodes(finite, FormatSpec(8, 64))
    assert_encodes((finite[:4] * torch.rand(4, 1).to(dtype))[:, :333], FormatSpec(4, 32))


@pytest.mark.parametrize(("bad", "column"), crossed([float("nan"), float("inf"), -float("inf")], [0, 299]))
def test_a_row_that_is_not_finite_is_marked_and_disturbs_no_other(bad: float, column: int) -> None:
    spec, x = FormatSpec(8, 64), torch.randn(3, 300)
    x[1, column] = bad
    for static in (None, torch.tensor(0.01)):
        assert_encodes(x, spec, static)
    *_, scales, tensor_scale = encode_rows(x.to(DEVICE), Lookup.of(codebooks(spec)), spec)
    assert tensor_scale.isnan().flatten().tolist() == [False, True, False]
    assert bool((scales.view(torch.uint8)[1] == NAN).all())


@pytest.mark.parametrize("columns", [16, 48, 1040])
def test_bits_left_over_at_the_end_of_a_row_are_zero(columns: int) -> None:
    """Blocks beyond the row would choose codebook 7, the only one that has a 0."""
    spec = FormatSpec(8, 16)
    books = torch.tensor([[-30 + k] * 8 + [20 + k] * 8 for k in range(7)] + [[0] * 16], dtype=torch.int8)
    x = torch.from_numpy(matrix("uniform", 2, columns, seed=1))
    encoded = encode(x, spec, books, absmax_row_scale(x))
    assert_same_bytes(encode_rows(x.to(DEVICE), Lookup.of(books.to(DEVICE)), spec), encoded)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0), (0, 0)])
def test_empty_operands(shape: tuple[int, int]) -> None:
    assert_encodes(torch.empty(shape).zero_(), FormatSpec())


def test_rows_may_be_strided() -> None:
    assert_encodes(torch.randn(3, 500)[:, 100:333], FormatSpec())


@pytest.mark.parametrize("programs", [1, 6, 100])
def test_a_row_shared_by_several_programs(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """One program for a row, three that share its five tiles, and one for each tile."""
    monkeypatch.setattr(encode_module, "ENOUGH_PROGRAMS", programs)
    assert_encodes(torch.from_numpy(matrix("mixed magnitudes", 2, 4500, seed=4)), FormatSpec())
