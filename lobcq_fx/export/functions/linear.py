"""The bodies of the linears: docs/format.md, "Decoding", "Product", in standard ONNX ops."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lobcq_fx.export.functions.body import FLOAT, Body
from lobcq_fx.export.functions.packing import last_size, leading_shape, reshape_last, scaled, scaled_entries


def build_linear(op: Body, *inputs: ir.Value) -> Sequence[ir.Value]:
    """y = `(sum * tensor_scale) * w_tensor_scale + bias`, the scales one at a time."""
    codes, selectors, scales, tensor_scale, codebooks, *weight = inputs
    a = scaled_entries(op, codes, selectors, scales, codebooks, op.attribute("activation_array_size"))
    return _scaled_product(op, a, tensor_scale, *weight)


def build_linear_int8_activation(op: Body, *inputs: ir.Value) -> Sequence[ir.Value]:
    """The same of an activation in int8."""
    entries, scales, tensor_scale, *weight = inputs
    a = scaled(op, entries, scales, op.attribute("array_size"), leading_shape(op, entries), last_size(op, entries))
    return _scaled_product(op, a, tensor_scale, *weight)


def build_linear_float_activation(op: Body, *inputs: ir.Value) -> Sequence[ir.Value]:
    """y = `x @ decoded.T + bias` in fp32, then in x's type."""
    x, w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, bias = inputs
    entries = scaled_entries(op, w_codes, w_selectors, w_scales, w_codebooks, op.attribute("array_size"))
    product = _product(op, op("Cast", x, to=FLOAT), op("Mul", entries, w_tensor_scale))
    return (op("CastLike", op("Add", product, _offset(op, w_codes, bias)), x),)


def _scaled_product(op: Body, a: ir.Value, tensor_scale: ir.Value, *weight: ir.Value) -> Sequence[ir.Value]:
    """Of scaled entries [..., Kp] and a packed weight with its bias."""
    w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, bias = weight
    w = scaled_entries(op, w_codes, w_selectors, w_scales, w_codebooks, op.attribute("array_size"))
    a = op("Slice", a, [0], op.attribute("in_features"), [-1])  # what lies behind K must not count
    product = op("Mul", op("Mul", _product(op, a, w), tensor_scale), w_tensor_scale)
    return (op("Add", product, _offset(op, w_codes, bias)),)


def _product(op: Body, x: ir.Value, w: ir.Value) -> ir.Value:
    """x [..., K] times w [N, Kp] transposed: x is filled up with zeros, which costs less than cutting w."""
    columns = last_size(op, w)
    fill = op("Concat", [0], op("Sub", columns, last_size(op, x)), axis=0)
    rows = op("Reshape", op("Pad", x, fill, None, [-1]), op("Concat", [-1], columns, axis=0))
    return reshape_last(op, op("Gemm", rows, w, transB=1), leading_shape(op, x), op("Shape", w, start=0, end=1))


def _offset(op: Body, w_codes: ir.Value, bias: ir.Value) -> ir.Value:
    """The bias [N], zeros where it is left out: Gemm's last input may be missing, Add's may not."""
    zeros = op("Expand", 0.0, op("Concat", [1], op("Shape", w_codes, start=0, end=1), axis=0))
    return op("Reshape", op("Gemm", op("Expand", 0.0, [1, 1]), zeros, bias), [-1])
