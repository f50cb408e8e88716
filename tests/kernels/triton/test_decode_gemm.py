"""Linears of up to 16 rows against float64 products of what `lobcq_fx.format` decodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, encode_int8
from lobcq_fx.kernels.triton import decode_gemm as module
from lobcq_fx.kernels.triton.configs import DecodeConfig
from lobcq_fx.kernels.triton.decode_gemm import decode_gemm, num_splits
from lobcq_fx.kernels.triton.encode_operand import encode_operand
from lobcq_fx.kernels.triton.lookup import Lookup
from lobcq_fx.kernels.triton.operands import Activation, Epilogue, Linear
from tests.format.cases import EVERY_SPEC
from tests.kernels.products import assert_product
from tests.kernels.triton.operands import DEVICE, INTERPRETED, Weight, activation, assert_same_bits, codebooks, weight
from tests.sweeps import crossed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def multiply(a: Activation, w: Weight, dtype: torch.dtype = torch.float32, **epilogue: Tensor) -> Tensor:
    linear = Linear(w.tiles, w.encoded.shape[0], Epilogue(w.scale, **epilogue))
    return decode_gemm(a, [linear], w.codebooks, w.encoded.spec, dtype)[0]


def product(x: Tensor, w: Weight, **options: Any) -> Tensor:
    """Of a float activation."""
    return multiply(Activation(x.to(DEVICE)), w, **options)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda s: s.name)
def test_every_format_and_plan(spec: FormatSpec) -> None:
    """Encoded activations as integers and in fp16, and float ones in bf16."""
    w, x = weight(spec, 37, 333), activation(3, 333)
    expected = decode(encode(x, spec, w.encoded.codebooks, absmax_row_scale(x)))
    for integers in (True, False):
        a = encode_operand(x.to(DEVICE), Lookup.of(w.codebooks), spec, None, integers)
        assert_product(multiply(a, w), expected, w.encoded)
        a = encode_operand(x.to(DEVICE), None, spec, None, integers)
        assert_product(multiply(a, w), decode(encode_int8(x, spec.array_size)), w.encoded)
    half = x.bfloat16()
    assert_product(product(half, w), half, w.encoded)


@pytest.mark.parametrize(("dtype", "shape"), crossed(DTYPES, [(1, 1, 1), (16, 16, 512), (9, 50, 700)]))
def test_shapes(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    w, x = weight(FormatSpec(8, 64), outputs, columns), activation(rows, columns).to(dtype)
    assert_product(product(x, w), x, w.encoded)


def test_fp32_activations_keep_all_their_bits() -> None:
    """Terms of 8 bits alone would be off by 2**-9, two of them by 2**-17."""
    w, x = weight(FormatSpec(8, 64), 16, 64), torch.zeros(1, 64)
    x[0, 5] = 1 + 2**-9 + 2**-17 + 2**-23
    assert_product(product(x, w), x, w.encoded)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_splits_of_k(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Also more of them than evenly divide the steps."""
    w, x = weight(FormatSpec(8, 64), 37, 2900), activation(5, 2900)
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    bias = torch.randn(37)
    out = product(x, w, bias=bias.to(DEVICE))
    assert_product(out, x, w.encoded, bias)
    assert torch.equal(out, product(x, w, bias=bias.to(DEVICE)))


@pytest.mark.parametrize(
    ("programs", "tiles", "expected"), [(64, 8, 8), (512, 8, 1), (1, 100, 16), (1, 3, 2), (1, 1, 1), (2000, 50, 1)]
)
def test_number_of_splits(programs: int, tiles: int, expected: int) -> None:
    assert num_splits(programs, tiles, DecodeConfig()) == expected


@pytest.mark.parametrize(("dtype", "splits"), crossed(DTYPES, [1, 2]))
def test_epilogue(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, splits: int) -> None:
    """Row scales and bias before the rounding, the residual after it: the bits of the graph that is not fused."""
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    w, x = weight(FormatSpec(8, 64), 20, 1200), activation(4, 1200).half()
    a = Activation(x.to(DEVICE), row_scales=torch.rand(4, 1, device=DEVICE))
    bias, residual = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((20,), (4, 20)))
    scaled = multiply(a, w, dtype, bias=bias)
    assert a.row_scales is not None
    assert_product(scaled, x.double() * a.row_scales.cpu(), w.encoded, bias)
    assert torch.equal(multiply(a, w, dtype, bias=bias, residual=residual), scaled + residual)
    assert torch.equal(multiply(a, w, dtype, residual=residual), multiply(a, w, dtype) + residual)


@pytest.mark.parametrize(("bad", "dtype"), crossed([float("nan"), float("inf"), -float("inf")], DTYPES))
def test_a_non_finite_row_disturbs_no_other(bad: float, dtype: torch.dtype) -> None:
    w, x = weight(FormatSpec(), 20, 300), activation(4, 300).to(dtype)
    clean = product(x, w)
    x[2, 123] = bad
    out = product(x, w)
    assert not bool(out[2].isfinite().any())
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_rows_may_be_strided() -> None:
    w, x = weight(FormatSpec(), 20, 100), activation(3, 300)[:, 77:177]
    assert_product(product(x, w), x, w.encoded)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    w, x = weight(FormatSpec(8, 128), 33, 600), activation(16, 600).half()
    whole = product(x, w)
    for rows in (9, 15):
        assert torch.equal(product(x[:rows], w), whole[:rows])
    # The interpreter multiplies 8 rows in another order than 16; an MMA instruction multiplies 8 columns at a time.
    eight = product(x[:8], w) if INTERPRETED else whole
    for rows in (1, 2, 7, 8):
        assert torch.equal(product(x[:rows], w), eight[:rows])


def test_a_row_of_integers_does_not_depend_on_how_many_there_are() -> None:
    w, x = weight(FormatSpec(8, 64), 33, 600), activation(16, 600)
    a = encode_operand(x.to(DEVICE), Lookup.of(w.codebooks), FormatSpec(8, 64))
    assert a.array_scales is not None
    assert a.row_scales is not None
    whole = multiply(a, w)
    for rows in (1, 8, 9):
        some = Activation(a.values[:rows], a.array_scales[:rows], a.row_scales[:rows])
        assert torch.equal(multiply(some, w), whole[:rows])


def linears(n: list[int], columns: int, dtype: torch.dtype, rows: int) -> list[Linear]:
    """Of these many outputs, with and without biases and residuals."""
    found = []
    for i, outputs in enumerate(n):
        w = weight(FormatSpec(8, 64), outputs, columns, values=torch.randn(outputs, columns))
        bias = torch.randn(outputs, device=DEVICE).to(dtype) if i % 2 else None
        residual = torch.randn(rows, outputs, device=DEVICE).to(dtype) if i % 3 == 1 else None
        found.append(Linear(w.tiles, outputs, Epilogue(w.scale * (i + 1), bias, residual)))
    return found


@pytest.mark.parametrize(
    ("dtype", "n", "splits"), crossed(DTYPES, [[20, 200], [64, 16, 1], [7, 0, 100, 33, 5, 65]], [1, 2])
)
def test_several_linears_have_the_bits_of_each(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, n: list[int], splits: int
) -> None:
    """Also more than a launch takes, and one without outputs."""
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    several, a = linears(n, 300, dtype, 3), Activation(activation(3, 300).to(dtype).to(DEVICE))
    books = codebooks(FormatSpec(8, 64))
    together = decode_gemm(a, several, books, FormatSpec(8, 64), dtype)
    for outputs, linear, out in zip(n, several, together, strict=True):
        (alone,) = decode_gemm(a, [linear], books, FormatSpec(8, 64), dtype)
        assert_same_bits(out, alone)
        assert out.shape == (3, outputs)
        assert out.is_contiguous()


def test_a_program_multiplies_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    class FirstTwo:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            assert grid == (5, 1)
            launch: Callable[..., None] = self.kernel[(2, 1)]
            return launch

    monkeypatch.setattr(module, "num_splits", lambda *_: 1)
    monkeypatch.setattr(module, "decode_gemm_kernel", FirstTwo(module.decode_gemm_kernel))
    spec, a = FormatSpec(8, 64), Activation(activation(3, 128).to(DEVICE))
    two, config = linears([100, 190], 128, torch.float32, 3), DecodeConfig(panels=4)
    first, second = decode_gemm(a, two, codebooks(spec), spec, torch.float32, config)
    assert not bool(first.isnan().any())
    assert bool(second.isnan().all())


@pytest.mark.parametrize("panels", [1, 2, 8])
def test_panels_of_a_program(panels: int) -> None:
    w, x = weight(FormatSpec(4, 32), 50, 300), activation(9, 300)
    linear, a = Linear(w.tiles, 50, Epilogue(w.scale)), Activation(x.to(DEVICE))
    config = DecodeConfig(panels=panels, max_splits=2)
    (out,) = decode_gemm(a, [linear], w.codebooks, w.encoded.spec, torch.float32, config)
    assert_product(out, x, w.encoded)


@pytest.mark.parametrize(("count", "launches"), [(1, 1), (4, 1), (5, 2)])
def test_a_launch_takes_four_linears(monkeypatch: pytest.MonkeyPatch, count: int, launches: int) -> None:
    class Counted:
        grids: ClassVar[list[tuple[int, int]]] = []

        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            self.grids.append(grid)
            return lambda *_, **__: None

    Counted.grids.clear()
    monkeypatch.setattr(module, "decode_gemm_kernel", Counted())
    monkeypatch.setattr(module, "num_splits", lambda *_: 1)
    a, spec = Activation(activation(3, 128).to(DEVICE)), FormatSpec(8, 64)
    several = linears([65] * count, 128, torch.float32, 3)
    decode_gemm(a, several, codebooks(spec), spec, torch.float32, DecodeConfig(panels=4))
    assert len(Counted.grids) == launches
    assert sum(programs for programs, _ in Counted.grids) == 2 * count


@pytest.mark.parametrize("integers", [True, False])
def test_a_marked_row_gives_nan_and_disturbs_no_other(integers: bool) -> None:
    w, x = weight(FormatSpec(), 20, 300), activation(4, 300)
    lookup = Lookup.of(w.codebooks)
    clean = multiply(encode_operand(x.to(DEVICE), lookup, FormatSpec(), None, integers), w)
    x[2, 123] = torch.inf
    out = multiply(encode_operand(x.to(DEVICE), lookup, FormatSpec(), None, integers), w)
    assert bool(out[2].isnan().all())
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_codebooks_that_are_not_aligned_are_refused() -> None:
    """They are loaded 16 bytes at a time."""
    w, a = weight(FormatSpec(), 20, 64), Activation(torch.zeros(3, 64, device=DEVICE))
    moved = torch.empty(w.codebooks.numel() + 8, dtype=torch.int8, device=DEVICE)[8:].view(w.codebooks.shape)
    with pytest.raises(ValueError, match="align them to 16 bytes"):
        decode_gemm(a, [Linear(w.tiles, 20, Epilogue(w.scale))], moved, FormatSpec(), torch.float32)


def test_entries_in_small_arrays_are_refused() -> None:
    w = weight(FormatSpec(8, 16), 20, 64)
    with pytest.raises(ValueError, match="format 8x16 has arrays below 32: encode to scaled entries"):
        multiply(Activation(torch.zeros(3, 64, dtype=torch.int8, device=DEVICE)), w)
