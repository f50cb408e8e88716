"""The `lobcq::` ops. Importing this package registers them with the torch dispatcher."""

import lobcq_fx.ops.fused
import lobcq_fx.ops.linear_prepacked  # noqa: F401  (its schemas and fake kernels: only devices implement it)
from lobcq_fx.ops.linear import linear, linear_float_activation
from lobcq_fx.ops.quantize_activation import quantize_activation
from lobcq_fx.ops.quantize_weight import quantize_weight

__all__ = ["linear", "linear_float_activation", "quantize_activation", "quantize_weight"]
