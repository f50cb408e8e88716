"""What encoding an activation begins with, in standard ONNX ops: block arrays, tensor scales, ratios."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lobcq_fx.export.functions.body import E4M3, FLOAT, Body
from lobcq_fx.export.functions.packing import last_size, leading_shape, reshape_last
from lobcq_fx.format.spec import E4M3_MAX, E4M3_MIN_SUBNORMAL


@dataclass(frozen=True)
class Rows:
    """Rows to encode, those with NaN or infinity made zeros.

    spoiled: bool [..., 1], which those are. arrays: fp32 [..., Kp / L_A, L_A], filled up with zeros.
    absmax: [..., Kp / L_A, 1]. tensor_scale: [..., 1, 1].
    """

    spoiled: ir.Value
    arrays: ir.Value
    absmax: ir.Value
    tensor_scale: ir.Value


def scaled_rows(op: Body, x: ir.Value, static_scale: ir.Value, entry_max: int) -> Rows:
    """x [..., K], of any float type, cut into block arrays, and step 1 for entries up to `entry_max`."""
    rows = op("Cast", x, to=FLOAT)
    # 0 * x is NaN for NaN and infinity, and so is the sum with it: a row that holds one is coded as zeros.
    spoiled = op("IsNaN", op("ReduceSum", op("Mul", rows, 0.0), [-1], keepdims=1))
    arrays = _block_arrays(op, op("Where", spoiled, 0.0, rows))
    absmax = op("ReduceMax", op("Abs", arrays), [-1], keepdims=1)
    largest = op("ReduceMax", absmax, [-2], keepdims=1)
    own = op("Where", op("Equal", largest, 0.0), 1.0, op("Div", largest, entry_max * E4M3_MAX))
    # A static scale, if there is one, is both bounds of Clip and replaces the row's own.
    return Rows(spoiled, arrays, absmax, op("Clip", own, static_scale, static_scale))


def scale_ratio(op: Body, absmax: ir.Value, tensor_scale: ir.Value, entry_max: int) -> ir.Value:
    """What step 2 rounds, at most 448."""
    ratio = op("Div", op("Div", absmax, float(entry_max)), tensor_scale)
    return op("Min", op("Where", op("IsNaN", ratio), 0.0, ratio), E4M3_MAX)  # 0 / 0


def at_least_smallest(op: Body, scales: ir.Value, absmax: ir.Value) -> ir.Value:
    """Rounded scales, fp32: positive where absmax is, 0 where it is 0."""
    return op("Where", op("Equal", absmax, 0.0), 0.0, op("Max", scales, E4M3_MIN_SUBNORMAL))


def marked(op: Body, rows: Rows, scales: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Scales as E4M3 and tensor scales as they are stored: NaN where a row was spoiled."""
    return (
        op("Cast", op("Where", rows.spoiled, float("nan"), op("Squeeze", scales, [-1])), to=E4M3),
        op("Where", rows.spoiled, float("nan"), op("Squeeze", rows.tensor_scale, [-1])),
    )


def _block_arrays(op: Body, rows: ir.Value) -> ir.Value:
    array_size, columns = op.attribute("array_size"), last_size(op, rows)
    fill = op("Mod", op("Neg", columns), array_size)
    padded = op("Pad", rows, op("Concat", [0], fill, axis=0), None, [-1])
    return reshape_last(
        op, padded, leading_shape(op, rows), op("Div", op("Add", columns, fill), array_size), array_size
    )
