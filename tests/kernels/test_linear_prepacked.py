"""`lobcq::linear_prepacked` on the CPU: from torch's dispatcher into the C++ core and back."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import threading
import time

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, rotate, universal_codebooks
from lobcq_fx.kernels.bind import weight_layout
from tests.kernels.linears import OUTPUTS, STATIC, LaidOutLinears, values
from tests.sweeps import crossed

LAYOUT = weight_layout(torch.device("cpu"))
pytestmark = pytest.mark.skipif(LAYOUT is None, reason="the CPU core was not built, or is switched off")

W4A4, W4A16 = torch.ops.lobcq.linear_prepacked.default, torch.ops.lobcq.linear_prepacked.float_activation

# All of opcheck's tests that need no gradient; none of these operands is float8, which "test_schema" cannot compare.
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class Linears(LaidOutLinears):
    """Called through torch's dispatcher."""

    def __init__(self, columns: int, spec: FormatSpec | None = None, outputs: tuple[int, ...] = OUTPUTS) -> None:
        super().__init__(LAYOUT, torch.device("cpu"), columns, spec, outputs)

    def w4a4(self, x: Tensor, static: Tensor | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return W4A4(x, self.tables, static, *self.rest, dtype)

    def w4a8(self, x: Tensor, static: Tensor | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return W4A4(x, None, static, *self.rest, dtype)

    def w4a16(self, x: Tensor) -> list[Tensor]:
        return W4A16(x, *self.rest)


@pytest.mark.parametrize(
    ("name", "shape"),
    crossed(
        ["1x16", "2x32", "4x64", "8x64", "16x128"],
        [(64,), (1, 200), (3, 7, 200), (2, 20, 65), (0, 64), (2, 0, 64), (3, 0), (20, 0), (0, 0), (0,)],
    ),
)
def test_results_are_the_reference_s(name: str, shape: tuple[int, ...]) -> None:
    linears, x = Linears(shape[-1], FormatSpec.from_name(name)), values(*shape)
    linears.check(linears.w4a4(x), x, linears.fake_quantized(x))
    linears.check(linears.w4a4(x, STATIC), x, linears.fake_quantized(x, STATIC))
    linears.check(linears.w4a8(x), x, linears.in_int8(x))
    linears.check(linears.w4a8(x, STATIC), x, linears.in_int8(x, STATIC))
    linears.check(linears.w4a16(x), x, x.reshape(x.shape[:-1].numel(), shape[-1]))


@pytest.mark.parametrize("shape", [(1, 200), (20, 200), (0, 200), (3, 0)], ids=str)
def test_linears_without_outputs(shape: tuple[int, ...]) -> None:
    linears, x = Linears(shape[-1], outputs=(0, 17, 0)), values(*shape)
    linears.check(linears.w4a4(x), x, linears.fake_quantized(x))
    linears.check(linears.w4a8(x), x, linears.in_int8(x))
    linears.check(linears.w4a16(x), x, x)
    none = Linears(shape[-1], outputs=())
    assert none.w4a4(x) == none.w4a8(x) == none.w4a16(x) == []


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    crossed(
        ["1x16", "2x32", "8x64", "16x128"],
        [(128,), (3, 7, 256), (2, 20, 128), (0, 128), (3, 0)],
        [torch.float32, torch.bfloat16],
    ),
)
def test_rotated_activations(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    linears, x = Linears(shape[-1], FormatSpec.from_name(name)), values(*shape).to(dtype)
    rotated = rotate(x.float(), linears.spec.array_size)
    for tables in (linears.tables, None):
        for static in (None, STATIC):
            rest = (tables, static, *linears.rest, torch.float32)
            for actual, expected in zip(W4A4(x, *rest, True), W4A4(rotated, *rest), strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    linears, x = Linears(200), values(5, 200).to(dtype)
    linears.biases = [bias.to(dtype) for bias in linears.biases]
    for results, rows in (
        (linears.w4a4(x, dtype=dtype), linears.fake_quantized(x)),
        (linears.w4a8(x, dtype=dtype), linears.in_int8(x)),
        (linears.w4a16(x), x.float()),
    ):
        assert {out.dtype for out in results} == {dtype}
        linears.check(results, x, rows)


VIEWS = {
    "a slice of the last dimension": values(4, 3, 400)[..., 100:300],
    "every other row": values(8, 200)[::2],
    "one position of a batch": values(5, 7, 200)[:, -1:],
    "batches that do not follow each other": values(6, 4, 200)[::2, 1:3],
    "transposed": values(200, 6).t(),
    "leading dimensions swapped": values(3, 5, 200).transpose(0, 1),
    "one row repeated": values(1, 200).expand(6, 200),
    "reversed by stride 2 within rows": values(4, 400)[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_activations_as_they_lie(view: str) -> None:
    x, linears = VIEWS[view], Linears(200)
    for actual, expected in zip(linears.w4a4(x), linears.w4a4(x.contiguous()), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(linears.w4a8(x), linears.w4a8(x.contiguous()), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(linears.w4a16(x), linears.w4a16(x.contiguous()), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("shape", "dtype"), crossed([(2, 3, 200), (0, 200), (200,)], [torch.float32, torch.bfloat16]))
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    linears, x = Linears(200), values(*shape).to(dtype)
    torch.library.opcheck(W4A4, (x, linears.tables, None, *linears.rest, dtype), test_utils=OPCHECKS)
    torch.library.opcheck(W4A4, (x, linears.tables, STATIC, *linears.rest, dtype), test_utils=OPCHECKS)
    torch.library.opcheck(W4A4, (x, None, STATIC, *linears.rest, dtype), test_utils=OPCHECKS)
    rotatable = Linears(128)
    rest = (rotatable.tables, None, *rotatable.rest, dtype, True)
    torch.library.opcheck(W4A4, (values(*shape[:-1], 128).to(dtype), *rest), test_utils=OPCHECKS)
    torch.library.opcheck(W4A16, (x, *linears.rest), test_utils=OPCHECKS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("static", [None, STATIC])
def test_a_bad_row_gives_nan_in_that_row_alone(bad: float, static: Tensor | None) -> None:
    linears, x = Linears(200), values(3, 200)
    clean = [*linears.w4a4(x, static), *linears.w4a8(x, static)]
    x[1, 150] = bad
    for out, expected in zip([*linears.w4a4(x, static), *linears.w4a8(x, static)], clean, strict=True):
        assert out[1].isnan().all()
        assert torch.equal(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_threads_change_no_bit(rows: int) -> None:
    linears, x = Linears(1000, outputs=(300, 77, 500)), values(rows, 1000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [linears.w4a4(x), linears.w4a4(x)]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def replaced(linears: Linears, position: int, value: object) -> list[object]:
    rest = linears.rest
    rest[position] = value
    return rest


X = values(2, 200)
REFUSALS = {
    "columns": (lambda m: (values(2, 128), *m.rest), "packed for another shape or format"),
    "array size": (lambda m: (X, *replaced(m, 5, 128)), "packed for another shape or format"),
    "no array size": (lambda m: (X, *replaced(m, 5, 48)), "array_size is 48: pass 16, 32, 64 or 128"),
    "outputs": (lambda m: (X, *replaced(m, 4, [16, 16, 16])), "packed for another shape or format"),
    "fewer biases": (lambda m: (X, *replaced(m, 3, m.biases[:2])), "differ in length"),
    "a bias too long": (
        lambda m: (X, *replaced(m, 3, m.biases[::-1])),
        r"biases\[0\] is float32 \[1\]: pass contiguous .* \[33\]",
    ),
    "other tables": (lambda m: (X, *replaced(m, 2, LAYOUT.tables(universal_codebooks(2)))), "packed for another"),
    "no tables": (
        lambda m: (X, *replaced(m, 2, torch.zeros_like(m.tables))),
        "weight_tables are not what this core makes",
    ),
    "short tables": (
        lambda m: (X, *replaced(m, 2, m.tables[:-64])),
        "weight_tables is uint8 .*: tables are what this core makes",
    ),
    "integers": (lambda m: (X.long(), *m.rest), "x is int64 .*: pass float32 or bfloat16 or float16"),
    "a number": (lambda m: (torch.tensor(1.0), *m.rest), r"x is float32 \[\]: pass"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_arguments_that_do_not_fit_are_refused(case: str) -> None:
    arguments, message = REFUSALS[case]
    linears = Linears(200)
    with pytest.raises(RuntimeError, match=f"lobcq::linear_prepacked: .*{message}"):
        W4A16(*arguments(linears))
    linears.check(linears.w4a16(X), X, X)  # and nothing is broken afterwards


def test_there_is_no_gradient() -> None:
    linears, x = Linears(200), X.clone().requires_grad_()
    for activation in (x, x * 2, x.detach().view(1, 400).requires_grad_().view(2, 200)):
        with pytest.raises(RuntimeError, match="inference only"):
            linears.w4a16(activation)
        with torch.no_grad():
            linears.check(linears.w4a16(activation), activation, activation)
    assert not any(out.requires_grad for out in linears.w4a4(X))


def test_several_python_threads_at_once() -> None:
    linears = Linears(640, outputs=(200, 48))
    inputs = [values(rows, 640) for rows in (1, 5, 20, 40)]
    expected = [linears.w4a4(x) for x in inputs]

    def work(index: int) -> bool:
        return all(
            torch.equal(a, b)
            for _ in range(20)
            for a, b in zip(linears.w4a4(inputs[index]), expected[index], strict=True)
        )

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_the_gil_is_released() -> None:
    """While one thread is in a long product, another one counts."""
    linears, x = Linears(2048, outputs=(2048,)), values(2048, 2048)
    linears.w4a4(x)
    ticks, done = [], threading.Event()

    def count() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    start = time.perf_counter()
    linears.w4a4(x)
    stop = time.perf_counter()
    done.set()
    counter.join()
    assert sum(start < tick < stop for tick in ticks) > 10


def _in_worker(threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    return [out.tolist() for out in Linears(640).w4a4(values(20, 640))]


def test_forked_workers() -> None:
    """As a DataLoader or a server forks: the child inherits the parent's weights and a parent that has used threads."""
    expected = [out.tolist() for out in Linears(640).w4a4(values(20, 640))]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map_async(_in_worker, [1, 1]).get(timeout=60)
    assert results == [expected, expected]
