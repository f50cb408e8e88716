"""The body of `QuantizeActivationInt8`: docs/format.md, "Activations in int8", in standard ONNX ops, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lobcq_fx.export.functions.body import E4M3, FLOAT, INT8, Body
from lobcq_fx.export.functions.packing import reshape_last
from lobcq_fx.export.functions.scaling import at_least_smallest, marked, scale_ratio, scaled_rows
from lobcq_fx.format.spec import E4M3_MIN_SUBNORMAL, INT8_MAX

STEP_UP = 1 / 12
"""This share of an E4M3 value is 0.6 to 1.4 of the distance to the next one: added and rounded, it gives that one."""

SUBNORMAL_STEP = 0.75 * E4M3_MIN_SUBNORMAL


def build(op: Body, x: ir.Value, static_scale: ir.Value) -> Sequence[ir.Value]:
    """entries, scales and tensor_scale of x, encoded along its last dimension."""
    rows = scaled_rows(op, x, static_scale, INT8_MAX)
    scales = _array_scales(op, rows.absmax, rows.tensor_scale)
    divisor = op("Mul", scales, rows.tensor_scale)
    normalised = op("Where", op("Equal", divisor, 0.0), 0.0, op("Div", rows.arrays, divisor))
    entries = op("Cast", op("Clip", op("Round", normalised), float(-INT8_MAX), float(INT8_MAX)), to=INT8)
    width = op("ReduceProd", op("Shape", entries, start=-2), keepdims=1)
    return (reshape_last(op, entries, op("Shape", entries, end=-2), width), *marked(op, rows, scales))


def _array_scales(op: Body, absmax: ir.Value, tensor_scale: ir.Value) -> ir.Value:
    """Rounded to nearest, and one value up where that is below; as fp32."""
    ratio = scale_ratio(op, absmax, tensor_scale, INT8_MAX)
    nearest = _rounded(op, ratio)
    above = _rounded(op, op("Add", nearest, op("Max", op("Mul", nearest, STEP_UP), SUBNORMAL_STEP)))
    return at_least_smallest(op, op("Where", op("Less", nearest, ratio), above, nearest), absmax)


def _rounded(op: Body, x: ir.Value) -> ir.Value:
    return op("Cast", op("Cast", x, to=E4M3), to=FLOAT)
