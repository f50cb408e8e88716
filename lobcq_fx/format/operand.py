"""What may be encoded, and with which tensor scales: checks that both number formats of activations share."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format.scales import absmax_row_scale

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_operand(x: Tensor) -> None:
    """Refuse what is no matrix of floats.

    Raises:
        ValueError: x is not [R, K] in fp32, bf16 or fp16.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: pass [R, K], leading dimensions flattened")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x is {x.dtype}: pass fp32, bf16 or fp16")


def given_tensor_scale(x: Tensor, tensor_scale: Tensor) -> Tensor:
    """A tensor scale that a caller gives for x [R, K]: fp32, [] or [R, 1], on x's device.

    Of scales for each row, those of rows that hold NaN or infinity become NaN.

    Raises:
        ValueError: its shape is neither.
    """
    if tensor_scale.dim() != 0 and tensor_scale.shape != (x.shape[0], 1):
        raise ValueError(f"tensor_scale has shape {tuple(tensor_scale.shape)}: pass a scalar or [{x.shape[0]}, 1]")
    tensor_scale = tensor_scale.to(device=x.device, dtype=torch.float32)
    if tensor_scale.dim() == 0:
        return tensor_scale
    return torch.where(torch.isfinite(absmax_row_scale(x)), tensor_scale, torch.nan)
