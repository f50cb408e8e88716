"""Encoding of activations, one row a token: float rows in; codes, selectors and scales out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.format.spec import BLOCK_SIZE, FormatSpec
from lobcq_fx.kernels.triton.encode_tile import (
    array_scales,
    buckets,
    choose_codebooks,
    row_absmax_bits,
    row_scale,
    to_grid,
)
from lobcq_fx.kernels.triton.launching import OPTIONS, ROUNDED_APART, next_power_of_two
from lobcq_fx.kernels.triton.lookup import Lookup
from lobcq_fx.kernels.triton.prologues import Prologue, operands, row_statistics, tile_to_encode

Packed = tuple[Tensor, Tensor, Tensor, Tensor]

TILE = 1024
"""Columns encoded at a time: eight for each of 128 threads."""

LEAST_TILE = 128
"""A whole block array, and eight blocks, whose selectors fill bytes."""

ENOUGH_PROGRAMS = 512
"""A row is shared by several programs until there are about as many: a few for each multiprocessor of a large GPU."""


@triton.jit
def encode_kernel(
    x,  # fp32, bf16 or fp16 [M, K]
    static_scale,  # fp32 [] or None
    entries,  # int32 [126, ceil(N_c / 4)]
    nearest,  # uint8 [126, N_c]
    codes,  # int32 [M, Kp / 8], a block a word
    selectors,  # uint8 [M, selector_bytes]
    scales,  # uint8 [M, Kp / L_A]
    tensor_scales,  # fp32 [M]
    prologue,  # `Operands`
    columns,
    row_stride,
    selector_bytes,
    ARRAY: tl.constexpr,
    NUM_CODEBOOKS: tl.constexpr,
    SELECTOR_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (m, i) reads row m for its scale, mostly from cache, and encodes every tile i, i + I, ... of it."""
    BLOCKS: tl.constexpr = TILE // 8
    ARRAY_BLOCKS: tl.constexpr = ARRAY // 8
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    arrays = tl.cdiv(columns, ARRAY)
    statistics = row_statistics(x, row, columns, prologue, TILE)
    tensor_scale = row_scale(row_absmax_bits(x, row, columns, statistics, prologue, TILE), static_scale)
    tl.store(tensor_scales + row, tensor_scale, mask=tl.program_id(1) == 0)

    column = tl.arange(0, BLOCKS)[:, None] * 8 + tl.arange(0, 8)[None, :]  # [B, 8]
    for start in range(tl.program_id(1) * TILE, arrays * ARRAY, tl.num_programs(1) * TILE):
        inside = start + column < columns
        numbers = tile_to_encode(x, row, columns, start + column, inside, statistics, prologue)
        scale_bytes = array_scales(numbers, tensor_scale, ARRAY_BLOCKS)  # [A]
        array = start // ARRAY + tl.arange(0, TILE // ARRAY)
        tl.store(scales + row * arrays + array, scale_bytes.to(tl.uint8), mask=array < arrays)

        grid = to_grid(numbers, scale_bytes, tensor_scale, ARRAY_BLOCKS)
        bucket = buckets(grid)
        chosen = choose_codebooks(grid, bucket, entries, NUM_CODEBOOKS)  # [B]
        code = tl.load(nearest + bucket * NUM_CODEBOOKS + chosen[:, None]).to(tl.int32)  # [B, 8]
        block = start // 8 + tl.arange(0, BLOCKS)
        blocks = arrays * ARRAY_BLOCKS
        words = tl.sum(code << (4 * tl.arange(0, 8))[None, :], axis=1)  # [B]
        tl.store(codes + row * blocks + block, words, mask=block < blocks)

        if SELECTOR_BITS > 0:
            # Eight blocks fill SELECTOR_BITS bytes. A row's last byte is filled up with zeros.
            chosen = tl.reshape(tl.where(block < blocks, chosen, 0), (BLOCKS // 8, 8))
            octets = tl.sum(chosen << (SELECTOR_BITS * tl.arange(0, 8))[None, :], axis=1)  # [B / 8]
            for i in tl.static_range(SELECTOR_BITS):
                byte = (start // 64 + tl.arange(0, BLOCKS // 8)) * SELECTOR_BITS + i
                value = ((octets >> (8 * i)) & 0xFF).to(tl.uint8)
                tl.store(selectors + row * selector_bytes + byte, value, mask=byte < selector_bytes)


def encode_rows(
    x: Tensor, lookup: Lookup, spec: FormatSpec, static_scale: Tensor | None = None, prologue: Prologue | None = None
) -> Packed:
    """Encode an activation, bit for bit as `lobcq::quantize_activation` does.

    Args:
        x: [M, K], fp32, bf16 or fp16, its last dimension contiguous.
        lookup: of the codebooks.
        spec: the configuration.
        static_scale: fp32 [], a calibrated tensor scale; None computes one for each row.
        prologue: what to encode in place of x: a function of it.

    Returns:
        codes uint8 [M, Kp/2], selectors uint8 [M, ...], scales float8_e4m3fn [M, Kp/L_A], tensor_scale fp32 [M, 1].
    """
    rows, columns = x.shape
    words = x.new_empty((rows, spec.padded_columns(columns) // BLOCK_SIZE), dtype=torch.int32)
    codes = words.view(torch.uint8)
    selectors = x.new_empty((rows, spec.selector_bytes(columns)), dtype=torch.uint8)
    scales = x.new_empty((rows, spec.num_arrays(columns)), dtype=torch.float8_e4m3fn)
    tensor_scale = x.new_empty((rows, 1), dtype=torch.float32)
    if rows == 0:
        return codes, selectors, scales, tensor_scale
    tile, grid = tiles(rows, columns)
    encode_kernel[grid](
        x, static_scale, lookup.entries, lookup.codes, words, selectors, scales.view(torch.uint8),
        tensor_scale, operands(prologue), columns, x.stride(0), selectors.shape[1], ARRAY=spec.array_size,
        NUM_CODEBOOKS=spec.num_codebooks, SELECTOR_BITS=spec.selector_bits, TILE=tile, num_warps=4,
        **(OPTIONS if prologue is None else ROUNDED_APART),
    )  # fmt: skip
    return codes, selectors, scales, tensor_scale


def tiles(rows: int, columns: int) -> tuple[int, tuple[int, int]]:
    """Columns encoded at a time, and the grid of programs, for [rows, columns]."""
    tile = min(TILE, max(LEAST_TILE, next_power_of_two(columns)))
    return tile, (rows, max(1, min(-(-columns // tile), ENOUGH_PROGRAMS // rows)))
