"""Encoding of activations for the GEMM kernels: what they multiply, in place of codes and selectors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.format.spec import FormatSpec
from lobcq_fx.kernels.triton.e4m3 import e4m3_value
from lobcq_fx.kernels.triton.encode import tiles
from lobcq_fx.kernels.triton.encode_tile import (
    LARGEST_ENTRY,
    LARGEST_INT8,
    array_scales,
    buckets,
    choose_codebooks,
    row_absmax_bits,
    row_scale,
    spread,
    to_grid,
    to_int8,
)
from lobcq_fx.kernels.triton.launching import OPTIONS, ROUNDED_APART
from lobcq_fx.kernels.triton.lookup import Lookup
from lobcq_fx.kernels.triton.operands import LEAST_INTEGER_ARRAY, Activation
from lobcq_fx.kernels.triton.prologues import Prologue, operands, row_statistics, tile_to_encode
from lobcq_fx.kernels.triton.weight_layout import TILE_COLUMNS, num_tiles

COLUMNS = tl.constexpr(TILE_COLUMNS)


@triton.jit
def encode_operand_kernel(
    x,  # fp32, bf16 or fp16 [M, K]
    static_scale,  # fp32 [] or None
    entries,  # int32 [126, ceil(N_c / 4)], or None: the entries are those of int8
    entry_bytes,  # int8, the same memory
    values,  # int8 [M, Kp], entries; or fp16 [M, Kp], scaled entries
    scales,  # fp32 [M, arrays of whole tiles of weights], or None with scaled entries
    tensor_scales,  # fp32 [M]
    prologue,  # `Operands`
    columns,
    row_stride,
    ARRAY: tl.constexpr,
    NUM_CODEBOOKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (m, i) encodes tiles i, i + I, ... of row m, as `encode_kernel` does."""
    BLOCKS: tl.constexpr = TILE // 8
    ARRAY_BLOCKS: tl.constexpr = ARRAY // 8
    ROW_BYTES: tl.constexpr = (NUM_CODEBOOKS + 3) // 4 * 4
    LARGEST: tl.constexpr = LARGEST_INT8 if entries is None else LARGEST_ENTRY
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    arrays = tl.cdiv(columns, ARRAY)
    statistics = row_statistics(x, row, columns, prologue, TILE)
    tensor_scale = row_scale(row_absmax_bits(x, row, columns, statistics, prologue, TILE), static_scale, LARGEST)
    tl.store(tensor_scales + row, tensor_scale, mask=tl.program_id(1) == 0)

    column = tl.arange(0, BLOCKS)[:, None] * 8 + tl.arange(0, 8)[None, :]  # [B, 8]
    for start in range(tl.program_id(1) * TILE, arrays * ARRAY, tl.num_programs(1) * TILE):
        inside = start + column < columns
        numbers = tile_to_encode(x, row, columns, start + column, inside, statistics, prologue)
        scale_bytes = array_scales(numbers, tensor_scale, ARRAY_BLOCKS, LARGEST)  # [A]
        if entries is None:
            entry = to_int8(numbers, scale_bytes, tensor_scale, ARRAY_BLOCKS)
        else:
            grid = to_grid(numbers, scale_bytes, tensor_scale, ARRAY_BLOCKS)
            bucket = buckets(grid)
            chosen = choose_codebooks(grid, bucket, entries, NUM_CODEBOOKS)  # [B]
            entry = tl.load(entry_bytes + bucket * ROW_BYTES + chosen[:, None])  # [B, 8]

        result = entry
        scale = e4m3_value(scale_bytes)
        if scales is None:
            scale = spread(scale, ARRAY_BLOCKS)
            result = (entry.to(tl.float32) * scale[:, None]).to(tl.float16)
        else:
            array = start // ARRAY + tl.arange(0, TILE // ARRAY)
            padded = tl.cdiv(columns, COLUMNS) * (COLUMNS // ARRAY)
            tl.store(scales + row * padded + array, scale, mask=array < padded)
        # A padded position has an entry, which may not be 0, and must contribute nothing.
        result = tl.where(inside, result, tl.zeros_like(result))
        padded = arrays * ARRAY
        tl.store(values + row * padded + start + column, result, mask=start + column < padded)


def encode_operand(
    x: Tensor, lookup: Lookup | None, spec: FormatSpec, static_scale: Tensor | None = None, integers: bool = True,
    prologue: Prologue | None = None, rotated: bool = False,
) -> Activation:  # fmt: skip
    """Encode an activation as operand of a GEMM: the numbers that `lobcq::quantize_activation` stores, looked up, or
    those of `lobcq::quantize_activation_int8`.

    Args:
        x: [M, K], fp32, bf16 or fp16, its last dimension contiguous.
        lookup: of the codebooks; None encodes in int8.
        spec: the configuration, in int8 the weights'.
        static_scale: fp32 [], a calibrated tensor scale; None computes one for each row.
        integers: to int8 entries and their scales where the format allows it; otherwise to scaled entries.
        prologue: what to encode in place of x: a function of it.
        rotated: rotates each block array of that first; K is a multiple of L_A.

    Returns:
        The operand. A row that holds NaN or infinity, or is to be encoded as such, has NaN scales.
    """
    rows, columns = x.shape
    integers = integers and spec.array_size >= LEAST_INTEGER_ARRAY
    values = x.new_empty((rows, spec.padded_columns(columns)), dtype=torch.int8 if integers else torch.float16)
    tile_arrays = num_tiles(columns) * TILE_COLUMNS // spec.array_size
    scales = x.new_empty((rows, tile_arrays), dtype=torch.float32) if integers else None
    tensor_scale = x.new_empty((rows, 1), dtype=torch.float32)
    if rows > 0:
        tile, grid = tiles(rows, columns)
        entries = None if lookup is None else lookup.entries
        entry_bytes = None if entries is None else entries.view(torch.int8)
        encode_operand_kernel[grid](
            x, static_scale, entries, entry_bytes, values, scales, tensor_scale,
            operands(prologue, spec.array_size if rotated else 0), columns, x.stride(0), ARRAY=spec.array_size,
            NUM_CODEBOOKS=spec.num_codebooks, TILE=tile, num_warps=4,
            **(OPTIONS if prologue is None else ROUNDED_APART),
        )  # fmt: skip
    return Activation(values, scales, tensor_scale)
