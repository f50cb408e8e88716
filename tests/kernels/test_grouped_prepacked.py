"""`lobcq::grouped_linear_prepacked` on the CPU: each group as one linear of its rows, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import (
    EncodedStack,
    FormatSpec,
    absmax_row_scale,
    encode,
    encode_int8,
    encode_stack,
    grouped_matmul,
    rotate,
    universal_codebooks,
)
from lobcq_fx.format.stacked import group_bounds
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.ops import schemas
from tests.kernels.cpu.operands import at_offset
from tests.kernels.violations import GROUPED_PREPACKED, assert_refused, torch_op

LAYOUT = weight_layout(torch.device("cpu"))
pytestmark = pytest.mark.skipif(LAYOUT is None, reason="the CPU core was not built, or is switched off")

ops = torch.ops.lobcq
EXPERTS, N = 5, 40
STATIC = torch.tensor(1e-4)
ENDS = ([1, 1, 9, 10, 20], [0, 0, 0, 0, 0], [20, 3, -7, 2**31 - 1, 2], [0, 0, 7, 7, 12])
ROWS = torch.tensor([3, 0, 0, 5, 2, 1, 5, 5, 4, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3])


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Stack:
    """A stack of weights as it is stored, and in kernel layout."""

    def __init__(self, columns: int, spec: FormatSpec | None = None, experts: int = EXPERTS, outputs: int = N) -> None:
        generator = torch.Generator().manual_seed(columns)
        scale = torch.logspace(-1, 1, experts).view(experts, 1, 1)
        self.spec = spec or FormatSpec()
        self.codebooks = universal_codebooks(self.spec.num_codebooks)
        weights = torch.randn(experts, outputs, columns, generator=generator) * scale
        self.encoded: EncodedStack = encode_stack(weights, self.spec, self.codebooks)
        matrices = map(self.encoded.matrix, range(experts))
        self.weights = torch.stack([LAYOUT.pack((w.codes, w.selectors, w.scales), w.spec, columns) for w in matrices])
        self.tables = LAYOUT.tables(self.codebooks)
        self.outputs = outputs

    def rest(self, offsets: Tensor | None, rows: Tensor | None) -> tuple:
        stored = (self.weights, self.encoded.tensor_scale, self.tables)
        return (*stored, offsets, rows, self.outputs, self.spec.array_size)

    def grouped(self, kind, x, offsets, rows=None, static=None, dtype=torch.float32, rotated=False) -> Tensor:
        rest = self.rest(offsets, rows)
        if kind == "w4a16":
            return ops.grouped_linear_prepacked.float_activation(x, *rest)
        tables = self.tables if kind == "w4a4" else None
        return ops.grouped_linear_prepacked(x, tables, static, *rest, dtype, rotated)

    def linear(self, kind, x, index, static=None, dtype=torch.float32, rotated=False) -> Tensor:
        """One matrix, by the op that multiplies one."""
        scale = [self.encoded.tensor_scale[index].clone()]
        rest = ([self.weights[index]], scale, self.tables, [torch.empty(0)], [self.outputs], self.spec.array_size)
        if kind == "w4a16":
            return ops.linear_prepacked.float_activation(x, *rest)[0]
        tables = self.tables if kind == "w4a4" else None
        return ops.linear_prepacked(x, tables, static, *rest, dtype, rotated)[0]

    def one_by_one(self, kind, x, ends, static=None, dtype=torch.float32, rotated=False) -> Tensor:
        out = torch.zeros(len(x), self.outputs, dtype=x.dtype if kind == "w4a16" else dtype)
        for index, (start, stop) in enumerate(group_bounds(ends, len(x))):
            out[start:stop] = self.linear(kind, x[start:stop], index, static, dtype, rotated)
        return out


def values(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("kind", ["w4a4", "w4a8", "w4a16"])
@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("gathered", [False, True])
def test_groups_are_linears_of_their_rows(kind, ends, gathered):
    stack = Stack(200)
    x = values(6 if gathered else 20, 200)
    actual = stack.grouped(kind, x, int32(ends), ROWS if gathered else None)
    assert torch.equal(actual, stack.one_by_one(kind, x[ROWS] if gathered else x, ends))


@pytest.mark.parametrize("spec", [FormatSpec(2, 16), FormatSpec(16, 128), FormatSpec(1, 32)], ids=lambda one: one.name)
@pytest.mark.parametrize("columns", [64, 72, 515])
def test_products_are_the_format_s(spec, columns):
    stack, x, ends = Stack(columns, spec), values(20, columns), [1, 1, 9, 10, 18]
    a = encode(x, spec, stack.codebooks, absmax_row_scale(x))
    for kind, operand in (("w4a4", a), ("w4a8", encode_int8(x, spec.array_size))):
        expected = grouped_matmul(operand, stack.encoded, ends)
        torch.testing.assert_close(stack.grouped(kind, x, int32(ends)), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["w4a4", "w4a8", "w4a16"])
def test_dtypes_static_scales_and_rotation(kind, dtype):
    stack, x, ends = Stack(128), values(20, 128).to(dtype), ENDS[0]
    options = [{}] if kind == "w4a16" else [{"static": STATIC}, {"rotated": True}, {"dtype": torch.bfloat16}]
    for option in options:
        actual = stack.grouped(kind, x, int32(ends), **option)
        assert actual.dtype == (dtype if kind == "w4a16" else option.get("dtype", torch.float32))
        assert torch.equal(actual, stack.one_by_one(kind, x, ends, **option))
    if kind == "w4a4":
        rotated = stack.grouped(kind, x, int32(ends), rotated=True)
        assert torch.equal(rotated, stack.grouped(kind, rotate(x.float(), 64), int32(ends)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_groups_of_very_different_sizes_on_any_number_of_threads(threads):
    """One row, hundreds of rows, none: the bits are those of one thread, and of linears one by one."""
    stack, x, ends = Stack(256, outputs=72), values(700, 256), [1, 310, 310, 317, 690]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = stack.grouped("w4a4", x, int32(ends))
        assert torch.equal(actual, stack.one_by_one("w4a4", x, ends))
        assert torch.equal(stack.grouped("w4a16", x, int32(ends)), stack.one_by_one("w4a16", x, ends))
    finally:
        torch.set_num_threads(before)
    assert not actual[690:].any()


def test_rows_of_no_group_are_zero_whatever_was_in_that_memory():
    stack, x = Stack(200), values(20, 200)
    for _ in range(3):
        torch.full((20, N), torch.nan)  # freed at once: the next result may lie there
        assert not stack.grouped("w4a4", x, int32([0, 0, 0, 0, 0])).any()
        assert not stack.grouped("w4a4", x, int32([3, 3, 3, 3, 7]))[7:].any()


@pytest.mark.parametrize("kind", ["w4a4", "w4a8", "w4a16"])
def test_groups_of_one_size(kind):
    stack = Stack(200)
    x = values(15, 200)
    expected = stack.grouped(kind, x, int32([3, 6, 9, 12, 15]))
    for form in (x.view(5, 3, 200), x.view(5, 3, 200).transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(stack.grouped(kind, form, None), expected.view(5, 3, N))
    assert stack.grouped(kind, x.view(5, 3, 200)[:, :0], None).shape == (5, 0, N)


def test_a_bad_row_spoils_what_is_gathered_from_it_and_nothing_else():
    stack, x = Stack(200), values(6, 200)
    clean = stack.grouped("w4a4", x, int32(ENDS[0]), ROWS)
    x[5, 70] = torch.inf
    out = stack.grouped("w4a4", x, int32(ENDS[0]), ROWS)
    assert out[ROWS == 5].isnan().all()
    assert torch.equal(out[ROWS != 5], clean[ROWS != 5])


@pytest.mark.parametrize("offset", [1, 4, 16])
def test_results_do_not_depend_on_where_operands_lie(offset):
    stack, x, offsets = Stack(200), values(6, 200), int32(ENDS[0])
    weights, scales, tables, *_, outputs, size = stack.rest(None, None)
    groups = at_offset(offsets, offset), at_offset(ROWS, offset)
    rest = (at_offset(weights, offset), at_offset(scales, offset), at_offset(tables, offset), *groups, outputs, size)
    actual = ops.grouped_linear_prepacked(at_offset(x, offset), rest[2], None, *rest, torch.float32)
    assert torch.equal(actual, stack.grouped("w4a4", x, offsets, ROWS))


@pytest.mark.parametrize("kind", ["w4a4", "w4a8", "w4a16"])
def test_fake_kernels_agree(kind):
    stack, x = Stack(200), values(6, 200)
    name = schemas.GROUPED_LINEAR_PREPACKED
    for offsets, rows, given in ((int32(ENDS[0]), ROWS, x), (int32(ENDS[0]), None, x), (None, None, x[:5, None])):
        rest = stack.rest(offsets, rows)
        if kind == "w4a16":
            call, op = (given, *rest), torch_op(f"{name}.float_activation")
        else:
            tables = stack.tables if kind == "w4a4" else None
            call, op = (given, tables, None, *rest, torch.bfloat16), torch_op(name)
        torch.library.opcheck(op, call, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("op", GROUPED_PREPACKED)
def test_every_violation_is_refused(op):
    stack, x, overload = Stack(200), values(6, 200), torch_op(op)
    named = {
        "x": x, "static_scale": STATIC, "weights": stack.weights, "tensor_scales": stack.encoded.tensor_scale,
        "weight_tables": stack.tables, "offsets": int32(ENDS[0]), "rows": ROWS, "out_features": N,
        "array_size": 64, "dtype": torch.float32, "rotated": False,
    }  # fmt: skip
    for tables in (stack.tables, None):
        call = {name: (named | {"activation_tables": tables})[name] for name in schemas.argument_names(op)}
        expected = overload(*call.values())
        assert_refused(op, call, overload, [RuntimeError])
        assert torch.equal(overload(*call.values()), expected)  # and nothing is broken afterwards


@pytest.mark.parametrize(
    ("shape", "offsets", "rows", "says"),
    [
        ((6, 200), int32(ENDS[0]), torch.tensor([0, 6]), "rows reach from 0 to 6: the activation has rows 0 to 5"),
        ((6, 200), int32(ENDS[0]), torch.tensor([0, -1]), "rows reach from -1 to 0"),
        ((0, 200), int32(ENDS[0]), torch.tensor([0]), "rows reach from 0 to 0"),
        ((2, 3, 200), int32(ENDS[0]), None, r"pass rows \[T, "),
        ((6, 200), None, None, r"without offsets pass \[E, M, "),
        ((5, 1, 200), None, ROWS, r"without offsets pass \[E, M, "),
        ((3, 2, 200), None, None, r"without offsets pass \[E, M, K\]"),
    ],
)
def test_groups_that_are_none_are_refused(shape, offsets, rows, says):
    stack = Stack(200)
    for kind in ("w4a4", "w4a16"):
        with pytest.raises(RuntimeError, match=says):
            stack.grouped(kind, torch.ones(shape), offsets, rows)


def test_a_stack_for_other_columns_in_as_many_bytes_is_refused():
    with pytest.raises(RuntimeError, match=r"grouped_linear_prepacked: weights\[0\] was packed for another shape"):
        Stack(205, FormatSpec(8, 16)).grouped("w4a4", values(20, 256), int32(ENDS[0]))
