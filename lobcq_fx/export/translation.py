"""How torch.onnx translates the torch ops `lobcq::` to the ONNX operators of the same domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as standard

import lobcq_fx.ops  # noqa: F401  (registers the torch ops)
from lobcq_fx.export.schemas import (
    ACTIVATION,
    GROUPED_LINEAR,
    GROUPED_LINEAR_FLOAT_ACTIVATION,
    GROUPED_LINEAR_INT8_ACTIVATION,
    INT8_ACTIVATION,
    LINEAR,
    LINEAR_FLOAT_ACTIVATION,
    LINEAR_INT8_ACTIVATION,
    PACKED,
    QUANTIZE_ACTIVATION,
    QUANTIZE_ACTIVATION_INT8,
    ROTATE,
    WEIGHT,
    operator,
)

FLOAT = int(ir.DataType.FLOAT)

OPERANDS = len(ACTIVATION) + len(WEIGHT)
"""Arguments of `lobcq::linear` that are parts of its two operands, and come first."""


def translation_table() -> dict[Any, Any]:
    """For torch.onnx's `custom_translation_table`."""
    ops = torch.ops.lobcq
    return {
        ops.quantize_activation.default: _quantize_activation,
        ops.quantize_activation_int8.default: _quantize_activation_int8,
        ops.rotate.default: _rotate,
        ops.linear.default: _linear,
        ops.linear.int8_activation: _linear_int8_activation,
        ops.linear.float_activation: _linear_float_activation,
        ops.grouped_linear.default: _grouped_linear,
        ops.grouped_linear.int8_activation: _grouped_linear_int8_activation,
        ops.grouped_linear.float_activation: _grouped_linear_float_activation,
    }


def _quantize_activation(x: Any, codebooks: Any, array_size: int, static_scale: Any = None) -> Any:
    return operator(QUANTIZE_ACTIVATION)(x, codebooks, static_scale, array_size=array_size)


def _quantize_activation_int8(x: Any, array_size: int, static_scale: Any = None) -> Any:
    return operator(QUANTIZE_ACTIVATION_INT8)(x, static_scale, array_size=array_size)


def _rotate(x: Any, array_size: int) -> Any:
    return operator(ROTATE)(x, array_size=array_size)


def _linear(*arguments: Any) -> Any:
    packed, rest = arguments[:OPERANDS], arguments[OPERANDS:]
    bias, in_features, array_size, dtype, activation_array_size = (*rest, None)[:5]
    y = operator(LINEAR)(
        *packed,
        _float(bias),
        in_features=in_features,
        array_size=array_size,
        activation_array_size=array_size if activation_array_size is None else activation_array_size,
    )
    return _cast(y, dtype)


def _linear_int8_activation(*arguments: Any) -> Any:
    *packed, bias, in_features, array_size, dtype = arguments
    y = operator(LINEAR_INT8_ACTIVATION)(*packed, _float(bias), in_features=in_features, array_size=array_size)
    return _cast(y, dtype)


def _cast(y: Any, dtype: int) -> Any:
    return y if dtype == FLOAT else standard.Cast(y, to=dtype)


def _linear_float_activation(*arguments: Any) -> Any:
    *operands, bias, array_size = arguments
    return operator(LINEAR_FLOAT_ACTIVATION)(*operands, _float(bias), array_size=array_size)


def _grouped_linear(*arguments: Any) -> Any:
    packed, rest = arguments[:OPERANDS], arguments[OPERANDS:]
    offsets, rows, in_features, array_size, dtype, activation_array_size = (*rest, None)[:6]
    parts = len(PACKED)
    y = _of_groups(
        packed[:parts],
        packed[parts:],
        offsets,
        rows,
        GROUPED_LINEAR,
        in_features=in_features,
        array_size=array_size,
        activation_array_size=array_size if activation_array_size is None else activation_array_size,
    )
    return _cast(y, dtype)


def _grouped_linear_int8_activation(*arguments: Any) -> Any:
    *packed, offsets, rows, in_features, array_size, dtype = arguments
    activation, weight = packed[: len(INT8_ACTIVATION)], packed[len(INT8_ACTIVATION) :]
    sizes = {"in_features": in_features, "array_size": array_size}
    return _cast(_of_groups(activation, weight, offsets, rows, GROUPED_LINEAR_INT8_ACTIVATION, **sizes), dtype)


def _grouped_linear_float_activation(*arguments: Any) -> Any:
    x, *weight, offsets, rows, array_size = arguments
    return _of_groups([x], weight, offsets, rows, GROUPED_LINEAR_FLOAT_ACTIVATION, array_size=array_size)


def _of_groups(activation: Sequence[Any], rest: Any, offsets: Any, rows: Any, name: str, **attributes: int) -> Any:
    """The operators take where groups end, and which rows they are of, always.

    activation: the parts that have its rows, [T, ...]; without offsets [E, M, ...], which are flattened, and the result
    is what they were.
    """
    shape = standard.Shape(activation[0])
    flat = activation if offsets is not None else [standard.Flatten(part, axis=2) for part in activation]
    if rows is None:
        rows = standard.Range(0, _size(standard.Shape(flat[0]), 0), 1)
    if offsets is not None:
        return operator(name)(*flat, *rest, offsets, rows, **attributes)
    ends = standard.Mul(standard.Range(1, standard.Add(_size(shape, 0), 1), 1), _size(shape, 1))
    y = operator(name)(*flat, *rest, standard.Cast(ends, to=int(ir.DataType.INT32)), rows, **attributes)
    grouped = standard.Concat(standard.Slice(shape, [0], [2]), standard.Slice(standard.Shape(y), [1], [2]), axis=0)
    return standard.Reshape(y, grouped, allowzero=1)


def _size(shape: Any, dimension: int) -> Any:
    return standard.Squeeze(standard.Slice(shape, [dimension], [dimension + 1]))


def _float(bias: Any) -> Any:
    """The ONNX operators take the bias in fp32, which is what it is added in."""
    if bias is None or bias.dtype == ir.DataType.FLOAT:
        return bias
    return standard.Cast(bias, to=FLOAT)
