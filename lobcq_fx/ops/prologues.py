"""What may be computed on the way into an encoder: norms and gated activations, by rules that fix every rounding.

Kernels that fuse them follow these rules, so that a fused graph encodes the same bytes. Means are taken in fp64 and
rounded to fp32: the order of the sum then does not show, whereas in fp32 it would, in the last bit. Everything else is
fp32, each operation rounded by itself (no fused multiply-add), and the result is rounded to x's dtype. `exp` is the
device's own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, round_first: bool = True) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * (weight + offset)`, over the last dimension.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: [K] or None.
        eps: added to the mean.
        offset: added to the weight: 1 in Gemma, 0 elsewhere.
        round_first: round to x's dtype before the weight is applied, and again after it, as Llama does; otherwise once,
            after it.

    Returns:
        [..., K] in x's dtype.
    """
    wide = x.float()
    mean_square = x.double().square().mean(-1, keepdim=True).float()
    normalized = wide * _inverse_root(mean_square + eps)
    if weight is None:
        return normalized.to(x.dtype)
    if round_first:
        normalized = normalized.to(x.dtype).float()
    return (normalized * (weight.float() + offset)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, over the last dimension, rounded once.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight, bias: [K] or None.
        eps: added to the variance, which divides by K.

    Returns:
        [..., K] in x's dtype.
    """
    exact = x.double()
    mean = exact.mean(-1, keepdim=True)
    variance = (exact - mean).square().mean(-1, keepdim=True).float()
    normalized = (x.float() - mean.float()) * _inverse_root(variance + eps)
    if weight is not None:
        normalized = normalized * weight.float()
    if bias is not None:
        normalized = normalized + bias.float()
    return normalized.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of two tensors of one shape and dtype, rounded to it after each of the two."""
    wide = gate.float()
    return ((wide / (1 + torch.exp(-wide))).to(gate.dtype).float() * up.float()).to(gate.dtype)


def _inverse_root(x: Tensor) -> Tensor:
    """fp32 -> `1 / sqrt(x)`, both to nearest. The root by way of fp64: torch's fp32 one, MKL's, is not."""
    return 1 / x.double().sqrt().float()
