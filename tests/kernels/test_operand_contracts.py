"""`lobcq::linear_prepacked` on the CPU takes operands that lie anywhere in memory, and refuses what it misreads."""

from __future__ import annotations

import pytest
import torch

import lobcq_fx.ops
from lobcq_fx.errors import OperandError
from lobcq_fx.format import FormatSpec
from lobcq_fx.ops import schemas
from lobcq_fx.ops.contracts import OPERANDS
from tests.kernels.cpu.operands import at_offset
from tests.kernels.test_linear_prepacked import LAYOUT, STATIC, W4A4, Linears, values
from tests.kernels.violations import PREPACKED, STORED, assert_refused, prepacked_call, stored_call, torch_op
from tests.sweeps import crossed

needs_core = pytest.mark.skipif(LAYOUT is None, reason="the CPU core was not built, or is switched off")

OFFSETS = (1, 2, 4, 16)
"""Bytes behind an address that 64 divides."""


@needs_core
@pytest.mark.parametrize(
    ("offset", "dtype", "rows"), crossed(OFFSETS, [torch.float32, torch.bfloat16, torch.float16], [1, 20])
)
def test_results_do_not_depend_on_where_operands_lie(offset: int, dtype: torch.dtype, rows: int) -> None:
    linears, x = Linears(200), values(rows, 200).to(dtype)
    linears.biases = [bias.to(dtype) for bias in linears.biases]
    expected = [*linears.w4a4(x, dtype=dtype), *linears.w4a4(x, STATIC), *linears.w4a8(x), *linears.w4a16(x)]
    weights, scales, tables, biases, outputs, array_size = linears.rest
    moved = [at_offset(weight, offset) for weight in weights]
    rest = (moved, [at_offset(scale, offset) for scale in scales], at_offset(tables, offset))
    rest += ([at_offset(bias, offset) for bias in biases], outputs, array_size)
    x, tables = at_offset(x, offset), at_offset(tables, offset)
    assert {tensor.data_ptr() % 64 for tensor in (x, tables, *moved)} == {offset}
    actual = [
        *W4A4(x, tables, None, *rest, dtype),
        *W4A4(x, tables, at_offset(STATIC, offset), *rest, torch.float32),
        *W4A4(x, None, None, *rest, torch.float32),
        *torch.ops.lobcq.linear_prepacked.float_activation(x, *rest),
    ]
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@needs_core
def test_activations_that_lie_anywhere_with_gaps_between_rows() -> None:
    linears, x = Linears(200), values(6, 400)
    for actual, expected in zip(linears.w4a4(at_offset(x, 1)[:, 100:300]), linears.w4a4(x[:, 100:300]), strict=True):
        assert torch.equal(actual, expected)


DEFAULTS = {
    schemas.QUANTIZE_ACTIVATION: lobcq_fx.ops.quantize_activation,
    schemas.QUANTIZE_ACTIVATION_INT8: lobcq_fx.ops.quantize_activation_int8,
    schemas.ROTATE: lobcq_fx.ops.rotate,
    schemas.QUANTIZE_WEIGHT: lobcq_fx.ops.quantize_weight,
    schemas.QUANTIZE_WEIGHT_SEARCHED: lobcq_fx.ops.quantize_weight_searched,
    schemas.DEQUANTIZE_WEIGHT: lobcq_fx.ops.dequantize_weight,
    schemas.WEIGHT_SQUARES: lobcq_fx.ops.weight_squares,
    schemas.COMPENSATE: lobcq_fx.ops.compensate,
    schemas.QUANTIZE_STATES: lobcq_fx.ops.quantize_states,
    schemas.DEQUANTIZE_STATES: lobcq_fx.ops.dequantize_states,
    schemas.ATTENTION: lobcq_fx.ops.attention,
    schemas.ATTENTION_FLOAT_STATES: lobcq_fx.ops.attention_float_states,
    schemas.RMS_NORM: lobcq_fx.ops.rms_norm,
    schemas.ROTATE_HALF: lobcq_fx.ops.rotate_half,
    schemas.SELECTIVE_SCAN: lobcq_fx.ops.selective_scan,
    schemas.CHUNK_SCAN: lobcq_fx.ops.chunk_scan,
    schemas.GATED_DELTA_RULE: lobcq_fx.ops.gated_delta_rule,
    schemas.LINEAR: lobcq_fx.ops.linear,
    schemas.LINEAR_INT8_ACTIVATION: lobcq_fx.ops.linear_int8_activation,
    schemas.LINEAR_FLOAT_ACTIVATION: lobcq_fx.ops.linear_float_activation,
    schemas.GROUPED_LINEAR: lobcq_fx.ops.grouped_linear,
    schemas.GROUPED_LINEAR_INT8_ACTIVATION: lobcq_fx.ops.grouped_linear_int8_activation,
    schemas.GROUPED_LINEAR_FLOAT_ACTIVATION: lobcq_fx.ops.grouped_linear_float_activation,
}


IN_CPP = (
    schemas.QUANTIZE_STATES, schemas.ATTENTION, schemas.ATTENTION_FLOAT_STATES, schemas.RMS_NORM, schemas.ROTATE_HALF,
)  # fmt: skip
"""Of the stored ops those that the core registers itself: torch makes a RuntimeError of what C++ throws."""


@pytest.mark.parametrize("op", STORED)
def test_default_implementations_refuse_every_violation(op: str) -> None:
    call = stored_call(op, torch.device("cpu"))
    DEFAULTS[op](*call.values())
    assert_refused(op, call, DEFAULTS[op], [])


@pytest.mark.parametrize("op", STORED)
def test_what_is_bound_to_the_stored_ops_refuses_every_violation(op: str) -> None:
    call, overload = stored_call(op, torch.device("cpu")), torch_op(op)
    overload(*call.values())
    assert_refused(op, call, overload, [RuntimeError] if op in IN_CPP else [])


@needs_core
@pytest.mark.parametrize("op", PREPACKED)
def test_the_core_and_what_is_built_on_it_refuse_every_violation(op: str) -> None:
    linears, overload = Linears(200), torch_op(op)
    for tables in (linears.tables, None):
        call = prepacked_call(op, values(2, 200), tables, linears.rest)
        expected = overload(*call.values())
        assert_refused(op, call, overload, [RuntimeError])
        for actual, before in zip(overload(*call.values()), expected, strict=True):  # and nothing is broken afterwards
            assert torch.equal(actual, before)


@pytest.mark.parametrize("op", OPERANDS)
def test_the_table_has_every_tensor_of_the_schema(op: str) -> None:
    schema = torch_op(op)._schema
    tensors = {argument.name for argument in schema.arguments if "Tensor" in str(argument.type)}
    assert {operand.name for operand in OPERANDS[op]} == tensors


def test_the_table_has_every_op() -> None:
    ops = {f"lobcq::{packet}" for packet in dir(torch.ops.lobcq) if not packet.startswith("_")} - {"lobcq::name"}
    assert ops == {name.partition(".")[0] for name in OPERANDS}
    assert len(PREPACKED) == len(torch.ops.lobcq.linear_prepacked.overloads())


@needs_core
@pytest.mark.parametrize("op", [op for op in PREPACKED if "rotated" in schemas.argument_names(op)])
def test_columns_that_fill_no_block_array_are_not_rotated(op: str) -> None:
    linears = Linears(200)
    call = prepacked_call(op, values(2, 200), linears.tables, linears.rest) | {"rotated": True}
    with pytest.raises(RuntimeError, match=r"x has 200 columns: pass whole block arrays, multiples of 64"):
        torch_op(op)(*call.values())
    for rotate in (torch.ops.lobcq.rotate, lobcq_fx.ops.rotate):
        with pytest.raises(OperandError, match=r"lobcq::rotate: x has 200 columns: pass whole block arrays"):
            rotate(values(2, 200), 64)


@needs_core
@pytest.mark.parametrize("shape", [(2**33, 200), (2**20, 2**13, 200), (2**40, 200)], ids=str)
def test_activations_of_more_rows_than_any_memory_has_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"x is \[\d+, (\d+, )?200\]: too large"):
        Linears(200).w4a4(values(1, 200).expand(shape))


@needs_core
def test_no_rows_of_any_number_of_columns() -> None:
    """Nothing is computed, sizes are: dimensions of zero hide those that would overflow."""
    with pytest.raises(RuntimeError, match=r"lobcq::linear_prepacked: "):
        Linears(200).w4a4(torch.empty(0).expand(2**40, 0).reshape(0, 2**40))
    for out in Linears(200).w4a4(torch.empty(1, 0, 200).expand(2**40, 0, 200)):
        assert out.shape[:2] == (2**40, 0)


@needs_core
def test_a_weight_for_other_columns_in_as_many_bytes_is_refused() -> None:
    """What it says of itself is all that tells: its bytes are as many, products would be of what its padding holds."""
    with pytest.raises(
        RuntimeError, match=r"weights\[0\] was packed for .*: \[33, 208\] in 8x16, .* \[33, 256\] in 8x16"
    ):
        Linears(205, FormatSpec(8, 16)).w4a4(values(2, 256))
