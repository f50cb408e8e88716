"""Encode activations and decode them again, by their device's kernels: what rounding does to them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import lobcq_fx.ops  # noqa: F401  (registers the ops that encode)
from lobcq_fx.format import Encoded, FormatSpec, Int8Activation, Operand, decode
from lobcq_fx.ops.dequantize_weight import decoded_weight


def encode_activation(
    x: Tensor, spec: FormatSpec, mode: str, codebooks: Tensor, static_scale: Tensor | None = None
) -> Operand:
    """Encode x [R, K] as a layer does.

    Args:
        x: fp32, bf16 or fp16.
        spec: the activation's format.
        mode: `w4a4` or `w4a8`.
        codebooks: int8 [N_c, 16], which int8 needs none of.
        static_scale: fp32 []; None computes a tensor scale for each row.
    """
    if mode == "w4a8":
        entries, scales, tensor_scale = torch.ops.lobcq.quantize_activation_int8(x, spec.array_size, static_scale)
        return Int8Activation(entries, scales, tensor_scale, x.shape[1])
    codebooks = codebooks.to(x.device)
    codes, selectors, scales, tensor_scale = torch.ops.lobcq.quantize_activation(
        x, codebooks, spec.array_size, static_scale
    )
    return Encoded(codes, selectors, scales, tensor_scale, codebooks, spec, x.shape[1])


def decode_activation(x: Operand) -> Tensor:
    """Its values, fp32 [R, K]: those that `decode` gives."""
    if isinstance(x, Int8Activation):
        return decode(x)
    return decoded_weight(replace(x, tensor_scale=x.tensor_scale.new_ones(()))) * x.tensor_scale
