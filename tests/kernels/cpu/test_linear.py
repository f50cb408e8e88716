"""W4A4, W4A8 and W4A16 products on every instruction set, against float64 products of what the reference decodes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, encode_int8
from lobcq_fx.kernels.cpu.library import Core
from lobcq_fx.kernels.cpu.operands import KernelActivation, PackedOperand
from tests.format.cases import ALL_SPECS, PROPERTY
from tests.kernels.cpu.operands import activation, at_offset, codebooks, encode_rows, packed, weight
from tests.kernels.products import assert_product
from tests.sweeps import crossed

SHAPES = [(1, 1, 1), (2, 37, 200), (8, 16, 1000), (31, 70, 777)]
"""M, N, K: one row to several micro-kernels, tails in every direction."""

LARGE_PAGES, SMAPS = Path("/sys/kernel/mm/transparent_hugepage"), Path("/proc/self/smaps")


@pytest.mark.parametrize(("spec", "shape"), crossed(ALL_SPECS, SHAPES))
def test_w4a4(core: Core, spec: FormatSpec, shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    w, x, bias = weight(core, spec, outputs, columns), activation(rows, columns), torch.randn(outputs)
    a = core.encode_activation(w.tables, x, spec.array_size)
    encoded = encode_rows(x, spec)
    assert_product(core.linear(w.tables, w.kernel, a), decode(encoded), w.encoded)
    with_bias = core.linear(w.tables, w.kernel, a, bias)
    assert_product(with_bias, decode(encoded), w.encoded, bias)
    loaded = core.load_activation(w.tables, packed(encoded))
    assert torch.equal(core.linear(w.tables, w.kernel, loaded, bias), with_bias)


@pytest.mark.parametrize(("spec", "shape"), crossed(ALL_SPECS, SHAPES))
def test_w4a8(core: Core, spec: FormatSpec, shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    w, x, bias = weight(core, spec, outputs, columns), activation(rows, columns), torch.randn(outputs)
    out = core.linear(w.tables, w.kernel, core.encode_activation(None, x, spec.array_size), bias)
    assert_product(out, decode(encode_int8(x, spec.array_size)), w.encoded, bias)
    loaded = core.load_int8_activation(core.encode_int8(x, spec.array_size))
    assert torch.equal(core.linear(w.tables, w.kernel, loaded, bias), out)


@pytest.mark.parametrize(("spec", "shape"), crossed(ALL_SPECS, SHAPES))
def test_w4a16(core: Core, spec: FormatSpec, shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    w, x, bias = weight(core, spec, outputs, columns), activation(rows, columns), torch.randn(outputs)
    a = core.split_activation(x, spec.array_size)
    assert_product(core.linear(w.tables, w.kernel, a, bias), x, w.encoded, bias)


@given(
    spec=st.sampled_from(ALL_SPECS),
    rows=st.integers(0, 40),
    outputs=st.integers(0, 70),
    columns=st.integers(0, 700),
    seed=st.integers(0, 2**31),
)
@PROPERTY
def test_fuzz(core: Core, spec: FormatSpec, rows: int, outputs: int, columns: int, seed: int) -> None:
    x = activation(rows, columns, seed)
    w = weight(core, spec, outputs, columns, seed)
    encoded = core.encode_activation(w.tables, x, spec.array_size)
    assert_product(core.linear(w.tables, w.kernel, encoded), decode(encode_rows(x, spec)), w.encoded)
    in_int8 = core.encode_activation(None, x, spec.array_size)
    assert_product(core.linear(w.tables, w.kernel, in_int8), decode(encode_int8(x, spec.array_size)), w.encoded)
    split = core.split_activation(x, spec.array_size)
    assert_product(core.linear(w.tables, w.kernel, split), x, w.encoded)


@pytest.mark.parametrize("array_size", [16, 64, 128])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_entries_do_not_overflow(core: Core, array_size: int, sign: int) -> None:
    """Every product is 31 * 31 and of one sign: the largest sums that 16-bit lanes must hold."""
    spec = FormatSpec(2, array_size)
    w, x = torch.full((32, 512), 0.3), torch.full((9, 512), sign * 2.0)
    w[1::2] *= -1
    ew, ex = encode(w, spec, codebooks(spec)), encode_rows(x, spec)
    tables = core.tables(codebooks(spec))
    kernel = core.pack_weight(packed(ew))
    for rows in (1, 2, 9):
        a = core.encode_activation(tables, x[:rows], array_size)
        assert_product(core.linear(tables, kernel, a), decode(ex)[:rows], ew)


@pytest.mark.parametrize("array_size", [16, 64, 128])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_int8_entries_do_not_overflow(core: Core, array_size: int, sign: int) -> None:
    """Every product is 127 * 31, or 127 * 63 with the weights' bias, and of one sign."""
    spec, books = FormatSpec(1, array_size), torch.tensor([[-31] * 8 + [31] * 8], dtype=torch.int8)
    w, x = torch.full((32, 512), 31.0), torch.full((9, 512), sign * 127.0)
    w[1::2] *= -1
    ew = encode(w, spec, books, torch.tensor(1.0))
    tables, kernel = core.tables(books), core.pack_weight(packed(ew))
    for rows in (1, 2, 9):
        a = core.encode_activation(None, x[:rows], array_size, torch.tensor(1.0))
        assert torch.equal(core.linear(tables, kernel, a), x[:rows] @ w.T)


@pytest.mark.parametrize("value", [1.0, -1.0, 2 - 2**-22, -1 - 2**-22, 31.5, 0.1, -(1 + 2**-6 + 2**-12 + 2**-18)])
def test_extreme_digits_do_not_overflow(core: Core, value: float) -> None:
    """Constant rows split into constant digits, among them the largest and the smallest."""
    w = weight(core, FormatSpec(8, 64), 48, 640)
    for rows in (1, 2, 11):
        x = torch.full((rows, 640), value)
        assert_product(core.linear(w.tables, w.kernel, core.split_activation(x, 64)), x, w.encoded)


@pytest.mark.parametrize("scale", [2.0**-140, 1e-38, 1e-30, 1e30, 1e37])
def test_split_keeps_its_precision_at_any_magnitude(core: Core, scale: float) -> None:
    w = weight(core, FormatSpec(8, 64), 20, 320)
    x = torch.randn(3, 320) * scale / 4
    out = core.linear(w.tables, replace(w.kernel, tensor_scale=1.0), core.split_activation(x, 64))
    entries = decode(replace(w.encoded, tensor_scale=torch.tensor(1.0))).double()
    expected = x.double() @ entries.T
    tolerance = 2e-6 * (x.double().abs() @ entries.abs().T) + 1e-43  # a few subnormal steps
    inside = expected.abs() < 1e38
    assert bool((((out.double() - expected).abs() <= tolerance) | ~inside).all())


@pytest.mark.parametrize(("rows", "bad"), crossed([1, 4, 8, 9, 30], [float("nan"), float("inf"), -float("inf")]))
def test_a_non_finite_row_gives_nan_and_disturbs_no_other(core: Core, rows: int, bad: float) -> None:
    w, x = weight(core, FormatSpec(), 40, 300), activation(rows, 300)
    clean, dirty = x.clone(), x.clone()
    dirty[rows // 2, 123] = bad
    others = [m for m in range(rows) if m != rows // 2]

    def products(values: torch.Tensor) -> list[torch.Tensor]:
        activations = [
            core.encode_activation(w.tables, values, 64),
            core.encode_activation(w.tables, values, 64, torch.tensor(0.1)),
            core.encode_activation(None, values, 64),
            core.encode_activation(None, values, 64, torch.tensor(0.1)),
            core.split_activation(values, 64),
        ]
        return [core.linear(w.tables, w.kernel, a) for a in activations]

    for out, expected in zip(products(dirty), products(clean), strict=True):
        assert bool(out[rows // 2].isnan().all())
        assert torch.equal(out[others], expected[others])


@pytest.mark.skipif(not LARGE_PAGES.is_dir(), reason="not Linux, or no large pages")
def test_a_large_weight_asks_for_large_pages(core: Core) -> None:
    stored = PackedOperand.empty(2048, 2048, FormatSpec(), torch.ones(()))
    for part in (stored.codes, stored.selectors, stored.scales):
        part.zero_()
    data = core.pack_weight(stored).data
    middle = data.data_ptr() + data.nbytes // 2
    mappings = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", SMAPS.read_text(), re.MULTILINE | re.DOTALL)
    (flags,) = (flags for first, last, flags in mappings if int(first, 16) <= middle < int(last, 16))
    assert "hg" in flags.split()


@pytest.mark.parametrize("offset", [1, 4, 16, 32])
@pytest.mark.parametrize("array_size", [16, 64])
def test_a_weight_may_lie_anywhere(core: Core, array_size: int, offset: int) -> None:
    """As where it was compiled into a program."""
    w, x = weight(core, FormatSpec(8, array_size), 50, 300), activation(40, 300)
    moved = replace(w.kernel, data=at_offset(w.kernel.data, offset))
    assert torch.equal(core.unpack_weight(moved).codes, w.encoded.codes)
    for rows in (1, 3, 40):
        for a in (
            core.encode_activation(w.tables, x[:rows], array_size),
            core.encode_activation(None, x[:rows], array_size),
            core.split_activation(x[:rows], array_size),
        ):
            assert torch.equal(core.linear(w.tables, moved, a), core.linear(w.tables, w.kernel, a))


def test_a_row_does_not_depend_on_its_neighbours(core: Core) -> None:
    """One row alone, a few, or many take different kernels; the bits are the same."""
    w, x = weight(core, FormatSpec(8, 128), 50, 1100), activation(600, 1100)
    kinds: dict[str, Callable[[torch.Tensor], KernelActivation]] = {
        "w4a4": lambda values: core.encode_activation(w.tables, values, 128),
        "w4a8": lambda values: core.encode_activation(None, values, 128),
        "w4a16": lambda values: core.split_activation(values, 128),
    }
    for kind, fill in kinds.items():
        whole = core.linear(w.tables, w.kernel, fill(x))
        for rows in (1, 2, 3, 7, 8, 9, 30, 300):
            assert torch.equal(core.linear(w.tables, w.kernel, fill(x[:rows])), whole[:rows]), (kind, rows)


@pytest.mark.parametrize("rows", [1, 64])
def test_threads_change_nothing(core: Core, rows: int) -> None:
    w, x = weight(core, FormatSpec(), 1000, 640), activation(rows, 640)
    serial = Core(core.path)
    a = core.encode_activation(w.tables, x, 64)
    before = torch.get_num_threads()
    results = [serial.linear(w.tables, w.kernel, a)]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [core.linear(w.tables, w.kernel, a) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_calls_from_several_threads_at_once(core: Core) -> None:
    w = weight(core, FormatSpec(), 200, 640)
    inputs = [activation(rows, 640, seed=rows) for rows in (1, 5, 20, 40)]

    def product(x: torch.Tensor) -> torch.Tensor:
        return core.linear(w.tables, w.kernel, core.encode_activation(w.tables, x, 64))

    expected = [product(x) for x in inputs]
    wrong = []

    def worker(index: int) -> None:
        wrong.extend(index for _ in range(20) if not torch.equal(product(inputs[index]), expected[index]))

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 12])
def test_half_precision_in_and_out(core: Core, dtype: torch.dtype, rows: int) -> None:
    w, x = weight(core, FormatSpec(), 33, 200), torch.randn(rows, 200).to(dtype)
    a = core.encode_activation(w.tables, x, 64)
    exact = core.linear(w.tables, w.kernel, a)
    assert torch.equal(core.linear(w.tables, w.kernel, a, dtype=dtype), exact.to(dtype))
    in_int8 = core.encode_activation(None, x, 64)
    assert_product(core.linear(w.tables, w.kernel, in_int8), decode(encode_int8(x, 64)), w.encoded)
    split = core.split_activation(x, 64)
    assert torch.equal(
        core.linear(w.tables, w.kernel, split, dtype=dtype), core.linear(w.tables, w.kernel, split).to(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_rounding_over_the_whole_range(core: Core, dtype: torch.dtype) -> None:
    """The bias alone (K = 0) runs every exponent through the conversion: subnormal, overflow, ties, NaN."""
    w = weight(core, FormatSpec(), 4096, 0)
    bias = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    bias = bias.to(torch.int32).view(torch.float32)
    bias[::2] = bias[::2].to(dtype).float() * (1 + torch.finfo(dtype).eps / 2)  # ties
    out = core.linear(w.tables, w.kernel, core.encode_activation(w.tables, torch.empty(1, 0), 64), bias, dtype)
    torch.testing.assert_close(out[0], bias.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_several_linears_share_an_activation_and_activation_codebooks_may_differ(core: Core) -> None:
    x = activation(6, 256)
    other = FormatSpec(16, 64)
    books = codebooks(other, seed=3)
    a = core.encode_activation(core.tables(books), x, 64)
    expected = decode(encode(x, other, books, absmax_row_scale(x)))
    for outputs, num_codebooks in ((24, 8), (40, 2)):
        w = weight(core, FormatSpec(num_codebooks, 64), outputs, 256)
        assert_product(core.linear(w.tables, w.kernel, a), expected, w.encoded)
