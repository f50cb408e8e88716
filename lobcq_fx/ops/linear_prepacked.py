"""`lobcq::linear_prepacked`: several linears of one float activation, their weights in a device's kernel layout.

There is no default implementation: what the weights' bytes mean is known to the device that packed them. Registered for
CPU tensors by the C++ core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.ops.operand_checks import check_fake
from lobcq_fx.ops.schemas import LINEAR_PREPACKED, LINEAR_PREPACKED_FLOAT_ACTIVATION


@torch.library.register_fake(LINEAR_PREPACKED)
def _fake_linear_prepacked(
    x: Tensor,
    activation_tables: Tensor | None,
    static_scale: Tensor | None,
    weights: list[Tensor],
    tensor_scales: list[Tensor],
    weight_tables: Tensor,
    biases: list[Tensor],
    out_features: list[int],
    array_size: int,
    dtype: torch.dtype,
    rotated: bool = False,
) -> list[Tensor]:
    """`x @ w.T + bias` for each weight, the activation encoded once (W4A4, W4A8).

    Args:
        x: [..., K], fp32, bf16 or fp16.
        activation_tables: uint8, the look-up tables of the codebooks that x is encoded with; None encodes it in int8.
        static_scale: fp32 [], a calibrated tensor scale; None computes one for each row.
        weights: each uint8 [bytes], a weight [N_i, K] in kernel layout.
        tensor_scales: each fp32 [].
        weight_tables: uint8, the look-up tables of the weights' codebooks.
        biases: each [N_i], or [0] for none.
        out_features: each N_i.
        array_size: L_A, of all operands.
        dtype: of the results.
        rotated: encodes `lobcq::rotate(x)` in place of x.

    Returns:
        For each weight [..., N_i], contiguous; NaN in the rows that hold NaN or infinity.
    """
    check_fake(LINEAR_PREPACKED, locals())
    return results_like(x, out_features, dtype)


@torch.library.register_fake(LINEAR_PREPACKED_FLOAT_ACTIVATION)
def _fake_linear_prepacked_float_activation(
    x: Tensor,
    weights: list[Tensor],
    tensor_scales: list[Tensor],
    weight_tables: Tensor,
    biases: list[Tensor],
    out_features: list[int],
    array_size: int,
) -> list[Tensor]:
    """The same with the float values of x (W4A16); the results are in x's dtype."""
    check_fake(LINEAR_PREPACKED_FLOAT_ACTIVATION, locals())
    return results_like(x, out_features, x.dtype)


def results_like(x: Tensor, out_features: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Unwritten results of linears of x [..., K]: [..., N_i] each."""
    return [torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device) for n in out_features]
