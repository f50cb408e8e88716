"""`lobcq::rms_norm`, `lobcq::rotate_half`: what a decoder computes between its linears, each as one call.

Default implementations and fake kernels. They are the operators that transformers' models spell out, with their
roundings: devices that have kernels for them give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.errors import OperandError
from lobcq_fx.ops.operand_checks import check, check_fake, refuse_gradient
from lobcq_fx.ops.schemas import RMS_NORM, ROTATE_HALF


def rms_norm(x: Tensor, weight: Tensor, eps: float, normalized: torch.dtype) -> Tensor:
    """`weight * (x * rsqrt(mean(x**2) + eps))` over the last dimension, in fp32 but for the product with the weight.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: [K], any of these.
        eps: added to the mean.
        normalized: dtype to which x is rounded before it is multiplied by the weight.

    Returns:
        [..., K], of the dtype that torch multiplies `normalized` and the weight in.

    Raises:
        OperandError: an operand is not what `contracts` says.
        LobcqError: an operand requires a gradient.
    """
    check(RMS_NORM, locals())
    for one in (x, weight):
        refuse_gradient(one)
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * (wide * inverse).to(normalized)).contiguous()


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """`x * cos + cat(-x[..., half:], x[..., :half]) * sin`: rotary position embeddings.

    Args:
        x: [B, H, T, D], fp32, bf16 or fp16.
        cos, sin: [B, H, T, D], the first three of them possibly 1, any of these dtypes.
        half: columns that change places with the others, usually D / 2.

    Returns:
        [B, H, T, D], laid out in memory as x is.

    Raises:
        OperandError: an operand is not what `contracts` says.
        LobcqError: an operand requires a gradient.
    """
    check(ROTATE_HALF, locals())
    for one in (x, cos, sin):
        refuse_gradient(one)
    if not 0 <= half <= x.shape[3]:
        raise OperandError(f"{ROTATE_HALF}: half is {half} of {x.shape[3]} columns")
    rotated = x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
    return torch.empty_like(x, dtype=rotated.dtype).copy_(rotated)


torch.library.impl(RMS_NORM, "CompositeExplicitAutograd", rms_norm)
torch.library.impl(ROTATE_HALF, "CompositeExplicitAutograd", rotate_half)


@torch.library.register_fake(RMS_NORM)
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float, normalized: torch.dtype) -> Tensor:
    check_fake(RMS_NORM, locals())
    return x.new_empty(x.shape, dtype=torch.promote_types(normalized, weight.dtype))


@torch.library.register_fake(ROTATE_HALF)
def _rotate_half_fake(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    check_fake(ROTATE_HALF, locals())
    dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), sin.dtype)
    return torch.empty_like(x, dtype=dtype)
