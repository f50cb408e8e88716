"""The bodies of the grouped linears: docs/format.md, "Stacked weights", in standard ONNX ops.

Every matrix is multiplied with all rows, and each row keeps the product of its group: right, and slow where there are
many matrices. The op library multiplies what is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lobcq_fx.export.functions.body import FLOAT, INT32, INT64, Body
from lobcq_fx.export.functions.packing import last_size, leading_shape, scaled, scaled_entries


def build_grouped_linear(op: Body, *inputs: ir.Value) -> Sequence[ir.Value]:
    """y = `(sum * tensor_scale) * w_tensor_scale` of each row's matrix, the scales one at a time."""
    codes, selectors, scales, tensor_scale, codebooks, *stack = inputs
    a = scaled_entries(op, codes, selectors, scales, codebooks, op.attribute("activation_array_size"))
    return _scaled_products(op, a, tensor_scale, *stack)


def build_grouped_linear_int8_activation(op: Body, *inputs: ir.Value) -> Sequence[ir.Value]:
    """The same of an activation in int8."""
    entries, scales, tensor_scale, *stack = inputs
    a = scaled(op, entries, scales, op.attribute("array_size"), leading_shape(op, entries), last_size(op, entries))
    return _scaled_products(op, a, tensor_scale, *stack)


def build_grouped_linear_float_activation(op: Body, *inputs: ir.Value) -> Sequence[ir.Value]:
    """y = `x @ decoded.T` of each row's matrix in fp32, then in x's type."""
    x, w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, ends, rows = inputs
    entries = scaled_entries(op, w_codes, w_selectors, w_scales, w_codebooks, op.attribute("array_size"))
    w = op("Mul", entries, op("Reshape", w_tensor_scale, [-1, 1, 1]))
    products = _products(op, op("Gather", op("Cast", x, to=FLOAT), rows), w)
    return (op("CastLike", _of_groups(op, products, ends, rows), x),)


def _scaled_products(op: Body, a: ir.Value, tensor_scale: ir.Value, *stack: ir.Value) -> Sequence[ir.Value]:
    """Of scaled entries [T, Kp] and packed weights [E, N, K] with the groups of rows."""
    w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, ends, rows = stack
    w = scaled_entries(op, w_codes, w_selectors, w_scales, w_codebooks, op.attribute("array_size"))
    a = op("Slice", a, [0], op.attribute("in_features"), [-1])  # what lies behind K must not count
    products = op("Mul", _products(op, op("Gather", a, rows), w), op("Gather", tensor_scale, rows))
    products = op("Mul", products, op("Reshape", w_tensor_scale, [-1, 1, 1]))
    return (_of_groups(op, products, ends, rows),)


def _products(op: Body, rows: ir.Value, w: ir.Value) -> ir.Value:
    """Rows [S, K] times every matrix of w [E, N, Kp], transposed: [E, S, N]. Rows are filled up with zeros."""
    fill = op("Concat", [0], op("Sub", last_size(op, w), last_size(op, rows)), axis=0)
    return op("MatMul", op("Pad", rows, fill, None, [-1]), op("Transpose", w, perm=[0, 2, 1]))


def _of_groups(op: Body, products: ir.Value, ends: ir.Value, rows: ir.Value) -> ir.Value:
    """Of products [E, S, N] each row's own: the first group that ends behind it; zeros where none does."""
    count, groups = op("Size", rows), op("Size", ends)
    numbers = op("Range", 0, count, 1)
    behind = op("Greater", op("Unsqueeze", op("Cast", ends, to=INT64), [-1]), op("Unsqueeze", numbers, [0]))
    first = op("ArgMax", op("Cast", behind, to=INT32), axis=0, keepdims=1)
    own = op("And", behind, op("Equal", op("Unsqueeze", op("Range", 0, groups, 1), [-1]), first))
    return op("ReduceSum", op("Where", op("Unsqueeze", own, [-1]), products, 0.0), [0], keepdims=0)
