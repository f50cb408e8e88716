"""Schemas of the `lobcq::` ops: the contract between the passes, which emit them, and the kernels behind them.

A device implementation registers with `torch.library.impl(name, "CPU" | "CUDA")` and takes precedence over the default
one in this package, which calls `lobcq_fx.format` on any device.

A packed operand travels as four tensors (codes, selectors, scales, tensor_scale) and the int8 [N_c, 16] codebooks that
decode it; activations keep their leading dimensions (batch, length), so that the ops add no reshapes to a graph.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from lobcq_fx.errors import LobcqError

QUANTIZE_ACTIVATION = "lobcq::quantize_activation"
LINEAR = "lobcq::linear"
LINEAR_FLOAT_ACTIVATION = "lobcq::linear.float_activation"

_WEIGHT = "Tensor w_codes, Tensor w_selectors, Tensor w_scales, Tensor w_tensor_scale, Tensor w_codebooks"

torch.library.define(
    QUANTIZE_ACTIVATION,
    "(Tensor x, Tensor codebooks, int array_size, Tensor? static_scale=None)"
    " -> (Tensor codes, Tensor selectors, Tensor scales, Tensor tensor_scale)",
)
torch.library.define(
    LINEAR,
    "(Tensor codes, Tensor selectors, Tensor scales, Tensor tensor_scale, Tensor codebooks,"
    f" {_WEIGHT}, Tensor? bias, int in_features, int array_size, ScalarType dtype) -> Tensor",
)
torch.library.define(
    LINEAR_FLOAT_ACTIVATION,
    f"(Tensor x, {_WEIGHT}, Tensor? bias, int array_size) -> Tensor",
)


def _refuse_backward(*_: Any) -> NoReturn:
    raise LobcqError(
        "the lobcq:: ops are inference only and have no gradient: call the model under torch.inference_mode(),"
        " and fine-tune the float model before quantizing it"
    )


for _name in (QUANTIZE_ACTIVATION, LINEAR, LINEAR_FLOAT_ACTIVATION):
    torch.library.register_autograd(_name, _refuse_backward)
