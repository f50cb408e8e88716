"""Schemas of the `lobcq::` ops: the contract between the passes, which emit them, and the kernels behind them.

A device implementation registers with `torch.library.impl(name, "CPU" | "CUDA")` and takes precedence over the default
one in this package, which calls `lobcq_fx.format` on any device.

A packed operand travels as four tensors (codes, selectors, scales, tensor_scale) and the int8 [N_c, 16] codebooks that
decode it; an activation in int8 as three (entries, scales, tensor_scale). Activations keep their leading dimensions
(batch, length), so that the ops add no reshapes to a graph.

The prepacked ops read weights in the layout of one device's kernels. Where a device has such kernels, `Prepack` puts
these ops in the place of the others in the graph that runs; a saved graph never holds them.

The scans are recurrences of models with states, which no graph of one length could hold as loops. They start from a
state and return the one after; a state of zeros is that of no tokens.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from lobcq_fx.errors import LobcqError

QUANTIZE_ACTIVATION = "lobcq::quantize_activation"
QUANTIZE_ACTIVATION_INT8 = "lobcq::quantize_activation_int8"
ROTATE = "lobcq::rotate"
QUANTIZE_WEIGHT = "lobcq::quantize_weight"
QUANTIZE_WEIGHT_SEARCHED = "lobcq::quantize_weight.searched"
DEQUANTIZE_WEIGHT = "lobcq::dequantize_weight"
WEIGHT_SQUARES = "lobcq::weight_squares"
COMPENSATE = "lobcq::compensate"
QUANTIZE_STATES = "lobcq::quantize_states"
DEQUANTIZE_STATES = "lobcq::dequantize_states"
ATTENTION = "lobcq::attention"
ATTENTION_FLOAT_STATES = "lobcq::attention.float_states"
RMS_NORM = "lobcq::rms_norm"
ROTATE_HALF = "lobcq::rotate_half"
SELECTIVE_SCAN = "lobcq::selective_scan"
CHUNK_SCAN = "lobcq::chunk_scan"
GATED_DELTA_RULE = "lobcq::gated_delta_rule"
LINEAR = "lobcq::linear"
LINEAR_FLOAT_ACTIVATION = "lobcq::linear.float_activation"
LINEAR_INT8_ACTIVATION = "lobcq::linear.int8_activation"
GROUPED_LINEAR = "lobcq::grouped_linear"
GROUPED_LINEAR_FLOAT_ACTIVATION = "lobcq::grouped_linear.float_activation"
GROUPED_LINEAR_INT8_ACTIVATION = "lobcq::grouped_linear.int8_activation"
LINEAR_PREPACKED = "lobcq::linear_prepacked"
LINEAR_PREPACKED_FLOAT_ACTIVATION = "lobcq::linear_prepacked.float_activation"
LINEAR_PREPACKED_RESIDUAL = "lobcq::linear_prepacked.residual"
LINEAR_PREPACKED_FLOAT_ACTIVATION_RESIDUAL = "lobcq::linear_prepacked.float_activation_residual"
LINEAR_PREPACKED_SILU_MUL = "lobcq::linear_prepacked.silu_mul"
LINEAR_PREPACKED_RMS_NORM = "lobcq::linear_prepacked.rms_norm"
LINEAR_PREPACKED_ADD_RMS_NORM = "lobcq::linear_prepacked.add_rms_norm"
LINEAR_PREPACKED_LAYER_NORM = "lobcq::linear_prepacked.layer_norm"
GROUPED_LINEAR_PREPACKED = "lobcq::grouped_linear_prepacked"
GROUPED_LINEAR_PREPACKED_FLOAT_ACTIVATION = "lobcq::grouped_linear_prepacked.float_activation"

_WEIGHT = "Tensor w_codes, Tensor w_selectors, Tensor w_scales, Tensor w_tensor_scale, Tensor w_codebooks"

torch.library.define(
    QUANTIZE_ACTIVATION,
    "(Tensor x, Tensor codebooks, int array_size, Tensor? static_scale=None)"
    " -> (Tensor codes, Tensor selectors, Tensor scales, Tensor tensor_scale)",
)
torch.library.define(
    QUANTIZE_ACTIVATION_INT8,
    "(Tensor x, int array_size, Tensor? static_scale=None) -> (Tensor entries, Tensor scales, Tensor tensor_scale)",
)
torch.library.define(ROTATE, "(Tensor x, int array_size) -> Tensor")
for _name in (QUANTIZE_WEIGHT, QUANTIZE_WEIGHT_SEARCHED):
    torch.library.define(
        _name,
        "(Tensor w, Tensor codebooks, int array_size)"
        " -> (Tensor codes, Tensor selectors, Tensor scales, Tensor tensor_scale)",
    )
torch.library.define(DEQUANTIZE_WEIGHT, f"({_WEIGHT}, int in_features, int array_size) -> Tensor")
torch.library.define(WEIGHT_SQUARES, f"(Tensor w, {_WEIGHT}, int array_size) -> Tensor")
torch.library.define(
    COMPENSATE,
    "(Tensor weight, Tensor other_errors, Tensor coupling, Tensor power, Tensor tensor_scale, Tensor codebooks,"
    " int array_size) -> (Tensor codes, Tensor selectors, Tensor scales, Tensor costs)",
)
torch.library.define(QUANTIZE_STATES, "(Tensor x, Tensor codebooks, int array_size) -> Tensor")
torch.library.define(
    DEQUANTIZE_STATES,
    "(Tensor rows, Tensor codebooks, int heads, int width, int array_size, ScalarType dtype) -> Tensor",
)
torch.library.define(
    ATTENTION,
    "(Tensor query, Tensor keys, Tensor values, Tensor codebooks, Tensor? mask, int heads, int value_width,"
    " int key_array_size, int value_array_size, float scale, bool in_int8=False) -> Tensor",
)
torch.library.define(
    ATTENTION_FLOAT_STATES,
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, bool enable_gqa) -> Tensor",
)
torch.library.define(RMS_NORM, "(Tensor x, Tensor weight, float eps, ScalarType normalized) -> Tensor")
torch.library.define(ROTATE_HALF, "(Tensor x, Tensor cos, Tensor sin, int half) -> Tensor")
torch.library.define(
    SELECTIVE_SCAN, "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state) -> (Tensor y, Tensor new_state)"
)
torch.library.define(
    CHUNK_SCAN,
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state, float dt_min, float dt_max, int chunk_size)"
    " -> (Tensor y, Tensor new_state)",
)
torch.library.define(
    GATED_DELTA_RULE,
    "(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor state, int chunk_size)"
    " -> (Tensor out, Tensor new_state)",
)
torch.library.define(
    LINEAR,
    "(Tensor codes, Tensor selectors, Tensor scales, Tensor tensor_scale, Tensor codebooks,"
    f" {_WEIGHT}, Tensor? bias, int in_features, int array_size, ScalarType dtype,"
    " int? activation_array_size=None) -> Tensor",
)
torch.library.define(
    LINEAR_FLOAT_ACTIVATION,
    f"(Tensor x, {_WEIGHT}, Tensor? bias, int array_size) -> Tensor",
)
torch.library.define(
    LINEAR_INT8_ACTIVATION,
    f"(Tensor entries, Tensor scales, Tensor tensor_scale, {_WEIGHT}, Tensor? bias, int in_features, int array_size,"
    " ScalarType dtype) -> Tensor",
)

_GROUPS = "Tensor? offsets, Tensor? rows"
torch.library.define(
    GROUPED_LINEAR,
    "(Tensor codes, Tensor selectors, Tensor scales, Tensor tensor_scale, Tensor codebooks,"
    f" {_WEIGHT}, {_GROUPS}, int in_features, int array_size, ScalarType dtype,"
    " int? activation_array_size=None) -> Tensor",
)
torch.library.define(
    GROUPED_LINEAR_FLOAT_ACTIVATION,
    f"(Tensor x, {_WEIGHT}, {_GROUPS}, int array_size) -> Tensor",
)
torch.library.define(
    GROUPED_LINEAR_INT8_ACTIVATION,
    f"(Tensor entries, Tensor scales, Tensor tensor_scale, {_WEIGHT}, {_GROUPS}, int in_features, int array_size,"
    " ScalarType dtype) -> Tensor",
)

_WEIGHTS = "Tensor[] weights, Tensor[] tensor_scales, Tensor weight_tables"
_PREPACKED = f"{_WEIGHTS}, Tensor[] biases, int[] out_features, int array_size"

_TABLES = "Tensor? activation_tables, Tensor? static_scale"  # no tables: the activation is encoded in int8
_TAIL = "ScalarType dtype, bool rotated=False"
torch.library.define(LINEAR_PREPACKED, f"(Tensor x, {_TABLES}, {_PREPACKED}, {_TAIL}) -> Tensor[]")
torch.library.define(LINEAR_PREPACKED_FLOAT_ACTIVATION, f"(Tensor x, {_PREPACKED}) -> Tensor[]")

_STACK = f"Tensor weights, Tensor tensor_scales, Tensor weight_tables, {_GROUPS}, int out_features, int array_size"
torch.library.define(GROUPED_LINEAR_PREPACKED, f"(Tensor x, {_TABLES}, {_STACK}, {_TAIL}) -> Tensor")
torch.library.define(GROUPED_LINEAR_PREPACKED_FLOAT_ACTIVATION, f"(Tensor x, {_STACK}) -> Tensor")

_RMS_NORM = "Tensor? norm_weight, float eps, float offset, bool round_first"
_FUSED = {
    LINEAR_PREPACKED_RESIDUAL: f"Tensor x, {_TABLES}, {_PREPACKED}, Tensor[] residuals, {_TAIL}",
    LINEAR_PREPACKED_FLOAT_ACTIVATION_RESIDUAL: f"Tensor x, {_PREPACKED}, Tensor[] residuals",
    LINEAR_PREPACKED_SILU_MUL: (f"Tensor gate, Tensor up, {_TABLES}, {_PREPACKED}, Tensor[] residuals, {_TAIL}"),
    LINEAR_PREPACKED_RMS_NORM: f"Tensor x, {_RMS_NORM}, {_TABLES}, {_PREPACKED}, {_TAIL}",
    LINEAR_PREPACKED_ADD_RMS_NORM: (f"Tensor x, Tensor residual, {_RMS_NORM}, {_TABLES}, {_PREPACKED}, {_TAIL}"),
    LINEAR_PREPACKED_LAYER_NORM: (
        f"Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, {_TABLES}, {_PREPACKED}, {_TAIL}"
    ),
}
for _name, _arguments in _FUSED.items():
    torch.library.define(_name, f"({_arguments}) -> Tensor[]")


def argument_names(op: str) -> list[str]:
    """Of an op's arguments, in order: what implementations of several ops at once bind them by."""
    packet, _, overload = op.removeprefix("lobcq::").partition(".")
    schema = getattr(getattr(torch.ops.lobcq, packet), overload or "default")._schema
    return [argument.name for argument in schema.arguments]


NO_GRADIENT = (
    "the lobcq:: ops are inference only and have no gradient: call the model under torch.inference_mode(), and"
    " fine-tune the float model before quantizing it, or adapters on what from_pretrained opens"
)


def _refuse_backward(*_: Any) -> NoReturn:
    raise LobcqError(NO_GRADIENT)


_ON_STORED = (
    QUANTIZE_ACTIVATION, QUANTIZE_ACTIVATION_INT8, ROTATE, QUANTIZE_WEIGHT, QUANTIZE_WEIGHT_SEARCHED,
    DEQUANTIZE_WEIGHT, WEIGHT_SQUARES, COMPENSATE, DEQUANTIZE_STATES, LINEAR, LINEAR_INT8_ACTIVATION,
    LINEAR_FLOAT_ACTIVATION,
    GROUPED_LINEAR, GROUPED_LINEAR_FLOAT_ACTIVATION, GROUPED_LINEAR_INT8_ACTIVATION,
    SELECTIVE_SCAN, CHUNK_SCAN, GATED_DELTA_RULE,
)  # fmt: skip
for _name in _ON_STORED:
    torch.library.register_autograd(_name, _refuse_backward)

# A registered formula is Python that runs on every call, with gradients off too. The kernels of these refuse by
# themselves an activation that requires a gradient.
_BY_KERNEL = (
    QUANTIZE_STATES, ATTENTION, ATTENTION_FLOAT_STATES, RMS_NORM, ROTATE_HALF, LINEAR_PREPACKED,
    LINEAR_PREPACKED_FLOAT_ACTIVATION, *_FUSED, GROUPED_LINEAR_PREPACKED, GROUPED_LINEAR_PREPACKED_FLOAT_ACTIVATION,
)  # fmt: skip
for _name in _BY_KERNEL:
    torch.library.impl(_name, "Autograd", torch.library.fallthrough_kernel)
