"""How torch.onnx translates the torch ops `lobcq::` to the ONNX operators of the same domain."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as standard

import lobcq_fx.ops  # noqa: F401  (registers the torch ops)
from lobcq_fx.export.schemas import (
    ACTIVATION,
    LINEAR,
    LINEAR_FLOAT_ACTIVATION,
    LINEAR_INT8_ACTIVATION,
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


def _float(bias: Any) -> Any:
    """The ONNX operators take the bias in fp32, which is what it is added in."""
    if bias is None or bias.dtype == ir.DataType.FLOAT:
        return bias
    return standard.Cast(bias, to=FLOAT)
