"""Encode and decode: every byte against the reference and the golden vectors, on every instruction set."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobcq_fx.format import (
    Encoded,
    FormatSpec,
    absmax_row_scale,
    absmax_tensor_scale,
    decode,
    encode,
    encode_int8,
    rotate,
)
from lobcq_fx.kernels.cpu.library import Core
from lobcq_fx.kernels.cpu.operands import Int8Operand, PackedOperand
from tests.format.cases import ALL_SPECS, KINDS, PROPERTY, codebooks_of, int8, matrix
from tests.kernels.cpu.operands import codebooks, weight
from tests.sweeps import crossed

NAN = 0x7F


def assert_same_bytes(actual: PackedOperand, expected: Encoded) -> None:
    assert torch.equal(actual.scales, expected.scales.view(torch.uint8))
    assert torch.equal(actual.selectors, expected.selectors)
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal(actual.tensor_scale.view(torch.int32), expected.tensor_scale.view(torch.int32))


def assert_int8(core: Core, x: torch.Tensor, array_size: int, scale: torch.Tensor | None = None) -> Int8Operand:
    actual, expected = core.encode_int8(x, array_size, scale), encode_int8(x, array_size, scale)
    assert torch.equal(actual.scales, expected.scales.view(torch.uint8))
    assert torch.equal(actual.entries, expected.entries)
    assert torch.equal(actual.tensor_scale.view(torch.int32), expected.tensor_scale.view(torch.int32))
    return actual


def assert_squares(sums: torch.Tensor, x: torch.Tensor, decoded: torch.Tensor) -> None:
    """In doubles; column i adds to place i % 16, and the places are added in their order, on every instruction set."""
    expected = torch.zeros(x.shape[0], 2, dtype=torch.float64)
    for place, values in enumerate((x.float(), x.float() - decoded)):
        squares, places = values.double().square(), torch.zeros(x.shape[0], 16, dtype=torch.float64)
        for first in range(0, x.shape[1], 16):
            part = squares[:, first : first + 16]
            places[:, : part.shape[1]] += part
        for column in places.unbind(1):
            expected[:, place] += column
    assert torch.equal(sums.view(torch.int64), expected.view(torch.int64))


def assert_encodes(core: Core, x: torch.Tensor, spec: FormatSpec, books: torch.Tensor) -> None:
    """All three rules for the tensor scale, and decoding; the same in int8."""
    scale = absmax_tensor_scale(x)
    for given_scale in (None, absmax_row_scale(x), scale, scale / 300):
        assert_int8(core, x, spec.array_size, given_scale)
    tables = core.tables(books)
    rows = absmax_row_scale(x)
    static = absmax_tensor_scale(x)
    for given_scale, reference in ((None, rows), (rows, rows), (static, static), (static / 3, static / 3)):
        expected = encode(x, spec, books, reference)
        actual = core.encode(tables, x, spec.array_size, given_scale)
        assert_same_bytes(actual, expected)
        values, truth = core.decode(tables, actual), decode(expected)
        assert torch.equal(values.view(torch.int32), truth.view(torch.int32))
        assert_squares(core.squares(tables, x, actual), x, truth)
    expected = encode(x, spec, books, search_scales=True)
    assert_same_bytes(core.encode_searched(tables, x, spec.array_size, static), expected)


@pytest.mark.parametrize(("spec", "columns"), crossed(ALL_SPECS, [1, 100, 1500]))
def test_every_format(core: Core, spec: FormatSpec, columns: int) -> None:
    x = torch.from_numpy(matrix("normal", 5, columns, seed=columns))
    assert_encodes(core, x, spec, codebooks(spec))


@pytest.mark.parametrize(("kind", "spec"), crossed(KINDS, [FormatSpec(8, 64), FormatSpec(16, 16), FormatSpec(1, 128)]))
def test_every_kind_of_values(core: Core, kind: str, spec: FormatSpec) -> None:
    assert_encodes(core, torch.from_numpy(matrix(kind, 7, 300, seed=3)), spec, codebooks(spec))


@given(
    spec=st.sampled_from(ALL_SPECS),
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 4),
    columns=st.integers(0, 1100),
    seed=st.integers(0, 2**31),
)
@PROPERTY
def test_fuzz(core: Core, spec: FormatSpec, kind: str, rows: int, columns: int, seed: int) -> None:
    x = torch.from_numpy(matrix(kind, rows, columns, seed))
    books = int8(codebooks_of(seed, spec.num_codebooks))
    assert_encodes(core, x, spec, books)


def test_a_static_scale_far_too_small_saturates_exactly(core: Core) -> None:
    """Grid values up to the clamp of 2047, which 8-bit and fp32 shortcuts do not reach."""
    spec = FormatSpec(16, 64)
    x = torch.from_numpy(matrix("heavy", 6, 512, seed=5))
    for factor in (0.9, 0.5, 0.2, 1e-3, 1e-30):
        scale = absmax_tensor_scale(x) * factor
        expected = encode(x, spec, codebooks(spec), scale)
        assert_same_bytes(core.encode(core.tables(codebooks(spec)), x, 64, scale), expected)
        assert_int8(core, x, 64, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(core: Core, dtype: torch.dtype) -> None:
    spec = FormatSpec()
    finite = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = torch.where(finite.isfinite(), finite, 0).view(256, 256)  # every number there is, subnormals included
    for x in (finite, finite * torch.rand(256, 1).to(dtype)):
        expected = encode(x, spec, codebooks(spec), absmax_row_scale(x))
        assert_same_bytes(core.encode(core.tables(codebooks(spec)), x, 64), expected)
        assert_int8(core, x, 64)


def test_rows_may_be_strided(core: Core) -> None:
    spec = FormatSpec()
    x = torch.randn(6, 500)[:, 100:333]
    expected = encode(x, spec, codebooks(spec), absmax_row_scale(x))
    assert_same_bytes(core.encode(core.tables(codebooks(spec)), x, 64), expected)
    assert_int8(core, x, 64)


@pytest.mark.parametrize(
    ("array_size", "dtype"), crossed([16, 32, 64, 128], [torch.float32, torch.bfloat16, torch.float16])
)
def test_rotated(core: Core, array_size: int, dtype: torch.dtype) -> None:
    """By itself; and on the way into an activation, which then is what it is where the rotated values are encoded."""
    columns = 1024 + 3 * 128
    w = weight(core, FormatSpec(8, array_size), 40, columns)
    for kind in KINDS:
        x = torch.from_numpy(matrix(kind, 3, columns + 7, seed=array_size)).to(dtype)[:, :columns]
        rotated = core.rotate(x, array_size)
        expected = rotate(x.float(), array_size)
        assert torch.equal(rotated.isnan(), expected.isnan())  # of no particular bits
        bits, expected_bits = (torch.where(y.isnan(), 0, y.view(torch.int32)) for y in (rotated, expected))
        assert torch.equal(bits, expected_bits)
        for scale in (None, torch.tensor(0.01), torch.full((3, 1), 0.02)):
            for tables in (w.tables, None):
                actual = core.encode_activation(tables, x, array_size, scale, rotated=True)
                wanted = core.encode_activation(tables, expected, array_size, scale)
                products = (core.linear(w.tables, w.kernel, a) for a in (actual, wanted))
                torch.testing.assert_close(*products, rtol=0, atol=0, equal_nan=True, msg=kind)


@pytest.mark.parametrize(("bad", "column"), crossed([float("nan"), float("inf"), -float("inf")], [0, 77, 299]))
def test_non_finite_activations_mark_their_row_or_array(core: Core, bad: float, column: int) -> None:
    spec = FormatSpec(8, 64)
    x = torch.randn(4, 300)
    x[2, column] = bad
    tables = core.tables(codebooks(spec))
    rows = core.encode(tables, x, 64)
    assert_same_bytes(rows, encode(x, spec, codebooks(spec), absmax_row_scale(x)))
    assert rows.tensor_scale.isnan().flatten().tolist() == [False, False, True, False]
    static = core.encode(tables, x, 64, torch.tensor(0.01))
    assert_same_bytes(static, encode(x, spec, codebooks(spec), torch.tensor(0.01)))
    assert (static.scales == NAN).nonzero().tolist() == [[2, column // 64]]
    for scale in (None, torch.tensor(0.01), torch.full((4, 1), 0.01)):
        assert_int8(core, x, 64, scale)


def test_tensor_scale(core: Core) -> None:
    x = torch.from_numpy(matrix("mixed magnitudes", 9, 1200, seed=1))
    assert torch.equal(core.tensor_scale(x), absmax_tensor_scale(x))
    assert core.tensor_scale(torch.zeros(3, 5)).item() == 1
    assert core.tensor_scale(torch.zeros(0, 5)).item() == 1
    x[4, 1100], x[5, 2] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"x\[4, 1100\] is nan: a weight must be finite"):
        core.tensor_scale(x)


def test_subnormals_are_kept_even_where_the_process_flushes_them(core: Core) -> None:
    spec, x = FormatSpec(), torch.from_numpy(matrix("subnormal", 3, 256, seed=2))
    scale = torch.tensor(2.0**-140)
    expected = encode(x, spec, codebooks(spec), scale)
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush subnormals on this CPU")
    try:
        assert_same_bytes(core.encode(core.tables(codebooks(spec)), x, 64, scale), expected)
        in_int8 = core.encode_int8(x, 64, scale)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(in_int8.entries, encode_int8(x, 64, scale).entries)


def test_threads_change_nothing(core: Core) -> None:
    x = torch.randn(257, 300)
    tables = core.tables(codebooks(FormatSpec()))
    serial, parallel = Core(core.path), core
    one, many = serial.encode(tables, x, 64), parallel.encode(tables, x, 64)
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(_tensors(one), _tensors(many)))


def test_golden_vectors(core: Core) -> None:
    if "LOBCQ_TEST_DATA" not in os.environ:
        pytest.skip("LOBCQ_TEST_DATA is not set: the golden vectors stand beside the folder it names")
    path = Path(os.environ["LOBCQ_TEST_DATA"]).parent / "format" / "golden_vectors.npz"
    with np.load(path) as data:
        cases = sorted({key.split("/")[0] for key in data})
        assert len(cases) == 48
        for case in cases:
            names = ("x", "codebooks", "array_size", "tensor_scale", "codes", "selectors", "scales", "decoded")
            field = {name: torch.from_numpy(np.array(data[f"{case}/{name}"])) for name in names}
            tables = core.tables(field["codebooks"])
            per_row = field["tensor_scale"].dim() == 2
            scale = None if per_row else core.tensor_scale(field["x"])
            out = core.encode(tables, field["x"], int(field["array_size"]), scale)
            for name in ("codes", "selectors", "scales", "tensor_scale"):
                assert torch.equal(getattr(out, name), field[name]), (case, name)
            assert torch.equal(core.decode(tables, out), field["decoded"]), case


def _tensors(operand: PackedOperand) -> tuple[torch.Tensor, ...]:
    return operand.codes, operand.selectors, operand.scales, operand.tensor_scale
