"""Tensor scales and block-array scales: steps 1 and 2 of the encoding."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format.spec import E4M3_MAX, E4M3_MIN_SUBNORMAL, ENTRY_MAX, INT8_MAX, FormatSpec

SCALE_STEPS = (0, -1, 1)
"""E4M3 neighbours, in bytes, of the scale that an array's largest magnitude asks for. They are worth 0.19 dB for
Gaussian data in 8x64; a step of 2 would add 0.06 dB there and a third to the time, a step of -2 nothing."""

_LARGEST_SCALE_BYTE = 0x7E


def tensor_scale_of_absmax(absmax: Tensor, entry_max: int = ENTRY_MAX) -> Tensor:
    """Tensor scale that goes with a largest magnitude: `absmax / (entry_max * 448)`, and 1 where that magnitude is 0.

    Args:
        absmax: fp32, any shape, not negative.
        entry_max: the largest entry: 31 of a codebook, 127 of an activation in int8.

    Returns:
        fp32, same shape; NaN where `absmax` is not finite, so that what is scaled by it decodes to NaN.
    """
    scale = torch.where(absmax == 0, 1.0, _divide(absmax, entry_max * E4M3_MAX))
    return torch.where(torch.isfinite(absmax), scale, torch.nan)


def absmax_tensor_scale(x: Tensor) -> Tensor:
    """The weight rule: one scale for all of x. Returns fp32 []; 1 for an empty tensor."""
    if x.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=x.device)
    return tensor_scale_of_absmax(torch.maximum(x.amax(), -x.amin()).float())


def absmax_row_scale(x: Tensor, entry_max: int = ENTRY_MAX) -> Tensor:
    """The activation rule: one scale for each row of x [..., K]. Returns fp32 [..., 1]."""
    return tensor_scale_of_absmax(_absmax(x), entry_max).unsqueeze(-1)


def block_arrays(x: Tensor, spec: FormatSpec) -> Tensor:
    """Cut x [R, K], any float dtype, into block arrays: fp32 [R, Kp / L_A, L_A], padded with zeros."""
    padding = spec.padded_columns(x.shape[1]) - x.shape[1]
    padded = torch.nn.functional.pad(x.float(), (0, padding)) if padding else x.float()
    return padded.reshape(x.shape[0], spec.num_arrays(x.shape[1]), spec.array_size)


def array_scales(arrays: Tensor, tensor_scale: Tensor) -> Tensor:
    """Scale of each block array, relative to the tensor scale.

    Args:
        arrays: fp32 [..., L_A], a block array a row.
        tensor_scale: fp32, broadcastable to `arrays.shape[:-1]`.

    Returns:
        float8_e4m3fn, shape `arrays.shape[:-1]`: `(absmax / 31) / tensor_scale` rounded to nearest even, saturating at
        448; 2**-9 where that rounds a positive absmax to 0; 0 where absmax is 0; NaN where absmax or the tensor
        scale is not finite.
    """
    absmax = _absmax(arrays)
    return _marked(_ratio(absmax, tensor_scale, ENTRY_MAX).to(torch.float8_e4m3fn), absmax, tensor_scale)


def int8_array_scales(arrays: Tensor, tensor_scale: Tensor) -> Tensor:
    """The same for an activation in int8: `(absmax / 127) / tensor_scale` rounded up, so that nothing is clipped."""
    absmax = _absmax(arrays)
    ratio = _ratio(absmax, tensor_scale, INT8_MAX)
    nearest = ratio.to(torch.float8_e4m3fn)
    up = nearest.view(torch.uint8) + (nearest.float() < ratio)  # 448 at most: the ratio is clamped to it
    return _marked(up.to(torch.uint8).view(torch.float8_e4m3fn), absmax, tensor_scale)


def _ratio(absmax: Tensor, tensor_scale: Tensor, entry_max: int) -> Tensor:
    """`(absmax / entry_max) / tensor_scale`, at most 448. Both quotients may underflow: 0 / 0 counts as 0."""
    return (_divide(absmax, entry_max) / tensor_scale).nan_to_num(nan=0.0).clamp(max=E4M3_MAX)


def _marked(scales: Tensor, absmax: Tensor, tensor_scale: Tensor) -> Tensor:
    """Rounded scales, but positive where absmax is, 0 where it is 0, NaN where it or the tensor scale is not finite."""
    positive = torch.where(absmax == 0, 0.0, scales.float().clamp(min=E4M3_MIN_SUBNORMAL))
    finite = torch.isfinite(absmax) & torch.isfinite(tensor_scale)
    return torch.where(finite, positive, torch.nan).to(torch.float8_e4m3fn)


def neighbour_scales(scales: Tensor) -> list[Tensor]:
    """The scales that are worth a search, `scales` float8_e4m3fn [...] first; 0 and NaN have no neighbours."""
    first = scales.view(torch.uint8).int()
    alone = (first == 0) | (first > _LARGEST_SCALE_BYTE)
    tried = [torch.where(alone, first, (first + step).clamp(1, _LARGEST_SCALE_BYTE)) for step in SCALE_STEPS]
    return [one.to(torch.uint8).view(torch.float8_e4m3fn) for one in tried]


def _absmax(x: Tensor) -> Tensor:
    """Largest magnitude along the last dimension in fp32, NaN if there is one; 0 where that dimension is empty."""
    if x.shape[-1] == 0:
        return torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    # Without the copy that abs() makes, and far faster than vector_norm(ord=inf). Exact in the operand's own dtype.
    return torch.maximum(x.amax(dim=-1), -x.amin(dim=-1)).float()


def _divide(x: Tensor, divisor: float) -> Tensor:
    """IEEE division. CUDA multiplies by the reciprocal of a Python scalar instead, which rounds differently."""
    return x / torch.full_like(x, divisor)
