"""Packed operands back to floats."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.format.spec import FormatSpec
from lobcq_fx.kernels.triton.e4m3 import e4m3_value
from lobcq_fx.kernels.triton.floats import narrow
from lobcq_fx.kernels.triton.launching import OPTIONS, next_power_of_two
from lobcq_fx.kernels.triton.packed import load_selectors, look_up

LEAST_TILE, TILE = 128, 1024
"""Columns that a program decodes."""


@triton.jit
def dequantize_kernel(
    codes,  # int32 [R, Kp / 8], a block a word
    selectors,  # uint8 [R, selector_bytes]
    scales,  # uint8 [R, Kp / L_A]
    tensor_scales,  # fp32 [R], or [] with a stride of 0; or None
    codebooks,  # int8 [N_c, 16]
    out,  # fp32, bf16 or fp16 [R, K]
    columns,
    selector_bytes,
    tensor_scale_stride,
    ARRAY: tl.constexpr,
    SELECTOR_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (r, i) decodes tile i of row r."""
    BLOCKS: tl.constexpr = TILE // 8
    row = tl.program_id(0).to(tl.int64)
    arrays = tl.cdiv(columns, ARRAY)
    blocks = arrays * (ARRAY // 8)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)  # [B]
    valid = block < blocks

    words = tl.load(codes + row * blocks + block, mask=valid, other=0)
    chosen = load_selectors(selectors + row * selector_bytes, block, selector_bytes, valid, SELECTOR_BITS)
    scale = e4m3_value(tl.load(scales + row * arrays + block // (ARRAY // 8), mask=valid, other=0).to(tl.int32))
    values = look_up(codebooks, words, chosen).to(tl.float32) * scale[:, None]  # [B, 8], exact
    if tensor_scales is not None:
        values *= tl.load(tensor_scales + row * tensor_scale_stride)

    column = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + row * columns + column, narrow(values, out.dtype.element_ty), mask=column < columns)


def dequantize(
    codes: Tensor,
    selectors: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    codebooks: Tensor,
    spec: FormatSpec,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decode an operand packed as at rest.

    Args:
        codes, selectors, scales: uint8 [R, Kp/2], uint8 [R, ...], float8_e4m3fn [R, Kp/L_A], contiguous.
        tensor_scale: fp32 [] or [R, 1]; None for entry times block-array scale alone, which is exact in fp32 and fp16.
        codebooks: int8 [N_c, 16].
        spec: the configuration.
        columns: K.
        dtype: fp32, bf16 or fp16.

    Returns:
        [R, K] in `dtype`: `lobcq_fx.format.decode`, rounded to it.
    """
    rows = codes.shape[0]
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    tile = min(TILE, max(LEAST_TILE, next_power_of_two(columns)))
    stride = 0 if tensor_scale is None or tensor_scale.dim() == 0 else 1
    dequantize_kernel[(rows, -(-columns // tile))](
        codes.view(torch.int32), selectors, scales.view(torch.uint8), tensor_scale, codebooks, out, columns,
        selectors.shape[1], stride, ARRAY=spec.array_size, SELECTOR_BITS=spec.selector_bits, TILE=tile, num_warps=4,
        **OPTIONS,
    )  # fmt: skip
    return out
