"""The `lobcq::` ops. Importing this package registers them with the torch dispatcher."""

import lobcq_fx.ops.fused
import lobcq_fx.ops.linear_prepacked  # noqa: F401  (its schemas and fake kernels: only devices implement it)
from lobcq_fx.ops.attention import attention, attention_float_states
from lobcq_fx.ops.between import rms_norm, rotate_half
from lobcq_fx.ops.chunk_scan import chunk_scan
from lobcq_fx.ops.compensate import compensate
from lobcq_fx.ops.dequantize_weight import dequantize_weight
from lobcq_fx.ops.gated_delta_rule import gated_delta_rule
from lobcq_fx.ops.grouped_linear import (
    grouped_linear,
    grouped_linear_float_activation,
    grouped_linear_int8_activation,
)
from lobcq_fx.ops.linear import linear, linear_float_activation, linear_int8_activation
from lobcq_fx.ops.quantize_activation import quantize_activation
from lobcq_fx.ops.quantize_activation_int8 import quantize_activation_int8
from lobcq_fx.ops.quantize_weight import quantize_weight, quantize_weight_searched
from lobcq_fx.ops.rotate import rotate
from lobcq_fx.ops.selective_scan import selective_scan
from lobcq_fx.ops.states import dequantize_states, quantize_states
from lobcq_fx.ops.weight_squares import weight_squares

__all__ = [
    "attention",
    "attention_float_states",
    "chunk_scan",
    "compensate",
    "dequantize_states",
    "dequantize_weight",
    "gated_delta_rule",
    "grouped_linear",
    "grouped_linear_float_activation",
    "grouped_linear_int8_activation",
    "linear",
    "linear_float_activation",
    "linear_int8_activation",
    "quantize_activation",
    "quantize_activation_int8",
    "quantize_states",
    "quantize_weight",
    "quantize_weight_searched",
    "rms_norm",
    "rotate",
    "rotate_half",
    "selective_scan",
    "weight_squares",
]
