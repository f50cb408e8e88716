"""Function bodies of the `lobcq` operators: what a runtime that does not know them executes instead."""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from lobcq_fx.export.functions import grouped_linear, linear, quantize_activation, quantize_activation_int8, rotate
from lobcq_fx.export.functions.body import function
from lobcq_fx.export.schemas import (
    GROUPED_LINEAR,
    GROUPED_LINEAR_FLOAT_ACTIVATION,
    GROUPED_LINEAR_INT8_ACTIVATION,
    LINEAR,
    LINEAR_FLOAT_ACTIVATION,
    LINEAR_INT8_ACTIVATION,
    QUANTIZE_ACTIVATION,
    QUANTIZE_ACTIVATION_INT8,
    ROTATE,
)

_BUILDERS: dict[str, Callable[..., Sequence[ir.Value]]] = {
    QUANTIZE_ACTIVATION: quantize_activation.build,
    QUANTIZE_ACTIVATION_INT8: quantize_activation_int8.build,
    ROTATE: rotate.build,
    LINEAR: linear.build_linear,
    LINEAR_INT8_ACTIVATION: linear.build_linear_int8_activation,
    LINEAR_FLOAT_ACTIVATION: linear.build_linear_float_activation,
    GROUPED_LINEAR: grouped_linear.build_grouped_linear,
    GROUPED_LINEAR_INT8_ACTIVATION: grouped_linear.build_grouped_linear_int8_activation,
    GROUPED_LINEAR_FLOAT_ACTIVATION: grouped_linear.build_grouped_linear_float_activation,
}


def function_body(name: str) -> ir.Function:
    """A new function of the operator called `name`."""
    return function(name, _BUILDERS[name])
