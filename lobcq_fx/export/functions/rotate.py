"""The body of `Rotate`: docs/format.md, "Rotation", in standard ONNX ops, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lobcq_fx.export.functions.body import FLOAT, Body
from lobcq_fx.export.functions.packing import last_size, leading_shape, reshape_last
from lobcq_fx.format.spec import ALLOWED_ARRAY_SIZES


def build(op: Body, x: ir.Value) -> Sequence[ir.Value]:
    """x in fp32, each block array rotated. Stages that an array is too small for are computed, and not taken."""
    array_size = op.attribute("array_size")
    arrays = reshape_last(
        op, op("Cast", x, to=FLOAT), leading_shape(op, x), op("Div", last_size(op, x), array_size), array_size
    )
    for distance in (1 << level for level in range(max(ALLOWED_ARRAY_SIZES).bit_length() - 1)):
        stage = _stage(op, arrays)
        arrays = stage if distance < min(ALLOWED_ARRAY_SIZES) else _if_larger(op, array_size, distance, stage, arrays)
    # Two to the power of -floor(log2(L_A) / 2).
    factor = op("Where", op("Greater", array_size, [32]), 0.125, 0.25)
    return (op("Reshape", op("Mul", arrays, factor), op("Shape", x), allowzero=1),)


def _stage(op: Body, arrays: ir.Value) -> ir.Value:
    """Neighbours are combined, and the lowest bit of their places becomes the highest (`lobcq_fx.format.rotate`)."""
    last, end = [-1], [max(ALLOWED_ARRAY_SIZES)]
    first, second = (op("Slice", arrays, [start], end, last, [2]) for start in (0, 1))
    return op("Concat", op("Add", first, second), op("Sub", first, second), axis=-1)


def _if_larger(op: Body, array_size: ir.Value, than: int, one: ir.Value, other: ir.Value) -> ir.Value:
    return op("Where", op("Greater", array_size, [than]), one, other)
