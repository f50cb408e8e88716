"""The `lobcq::` ops. Importing this package registers them with the torch dispatcher."""

from lobcq_fx.ops.linear import linear, linear_float_activation
from lobcq_fx.ops.quantize_activation import quantize_activation

__all__ = ["linear", "linear_float_activation", "quantize_activation"]
