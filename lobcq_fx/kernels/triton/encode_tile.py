"""The encoding of one tile, which every kernel that encodes shares: docs/format.md, steps 1 to 5, and in int8."""

from __future__ import annotations

import triton
import triton.language as tl

from lobcq_fx.format.spec import E4M3_MAX, ENTRY_MAX, GRID, GRID_MAX, INT8_MAX
from lobcq_fx.kernels.triton.e4m3 import NAN_BYTE, e4m3_byte, e4m3_value, round_half_even
from lobcq_fx.kernels.triton.lookup import FIRST_BUCKET, LAST_BUCKET
from lobcq_fx.kernels.triton.prologues import prologue_result, source_numbers

INFINITY_BITS = tl.constexpr(0x7F800000)
LARGEST_SCALE = tl.constexpr(E4M3_MAX)
LARGEST_ENTRY = tl.constexpr(float(ENTRY_MAX))
LARGEST_INT8 = tl.constexpr(float(INT8_MAX))
GRID_STEPS = tl.constexpr(float(GRID))
GRID_LIMIT = tl.constexpr(float(GRID_MAX))
FIRST = tl.constexpr(FIRST_BUCKET)
LAST = tl.constexpr(LAST_BUCKET)


@triton.jit
def magnitude_bits(x):
    """fp32 -> the bits of |x| as int32: ordered as the magnitudes are, with infinity and then NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scale(absmax_bits, static_scale, LARGEST: tl.constexpr = LARGEST_ENTRY):
    """The tensor scale of a row whose entries reach LARGEST, from the bits of its absmax; NaN where that is not finite.

    static_scale: or None. NaN too where it is none that a calibration gives, which no host has looked at.
    """
    if static_scale is not None:
        scale = tl.load(static_scale)
        bits = scale.to(tl.int32, bitcast=True)  # a comparison of floats may take subnormal ones for zero
        scale = tl.where((bits > 0) & (bits < INFINITY_BITS), scale, float("nan"))
    else:
        absmax = absmax_bits.to(tl.float32, bitcast=True)
        scale = tl.where(absmax_bits == 0, 1.0, tl.div_rn(absmax, LARGEST * LARGEST_SCALE))
    return tl.where(absmax_bits >= INFINITY_BITS, float("nan"), scale)


@triton.jit
def row_absmax_bits(x, row, columns, statistics, prologue, TILE: tl.constexpr):
    """x: pointer to row `row`, of `columns` numbers -> the bits of the absmax of what the prologue makes of it."""
    offset = tl.arange(0, TILE)
    absmax = tl.zeros((TILE,), tl.int32)
    for start in range(0, columns, TILE):
        column = start + offset
        inside = column < columns
        numbers = source_numbers(x, row, column, inside, prologue)
        numbers = prologue_result(numbers, x, row, column, inside, statistics, prologue)
        absmax = tl.maximum(absmax, magnitude_bits(numbers))
    return tl.max(absmax, axis=0)


@triton.jit
def spread(per_array, ARRAY_BLOCKS: tl.constexpr):
    """[A] -> [B]: each array's value for each of its blocks."""
    repeated = tl.broadcast_to(per_array[:, None], (per_array.shape[0], ARRAY_BLOCKS))
    return tl.reshape(repeated, (per_array.shape[0] * ARRAY_BLOCKS,))


@triton.jit
def array_scales(x, tensor_scale, ARRAY_BLOCKS: tl.constexpr, LARGEST: tl.constexpr = LARGEST_ENTRY):
    """x fp32 [B, 8] -> E4M3 bytes int32 [A] of its block arrays, whose entries reach LARGEST; rounded up for int8."""
    block_max = tl.max(magnitude_bits(x), axis=1)  # [B]
    absmax_bits = tl.max(tl.reshape(block_max, (x.shape[0] // ARRAY_BLOCKS, ARRAY_BLOCKS)), axis=1)  # [A]
    ratio = tl.div_rn(tl.div_rn(absmax_bits.to(tl.float32, bitcast=True), LARGEST), tensor_scale)
    ratio = tl.where(ratio == ratio, ratio, 0.0)  # both quotients may underflow, to 0 / 0
    byte = tl.where(absmax_bits == 0, 0, e4m3_byte(ratio, LARGEST == LARGEST_INT8))
    finite = (absmax_bits < INFINITY_BITS) & (magnitude_bits(tensor_scale) < INFINITY_BITS)
    return tl.where(finite, byte, NAN_BYTE)


@triton.jit
def to_grid(x, scale_bytes, tensor_scale, ARRAY_BLOCKS: tl.constexpr):
    """x fp32 [B, 8], E4M3 bytes int32 [A] -> grid values int32 [B, 8]; 0 where the divisor is 0 or NaN."""
    steps = normalised(x, scale_bytes, tensor_scale, ARRAY_BLOCKS) * GRID_STEPS
    # Clamped before it is rounded, which is the same, as the limit is an integer.
    return round_half_even(tl.minimum(tl.maximum(steps, -GRID_LIMIT), GRID_LIMIT))


@triton.jit
def to_int8(x, scale_bytes, tensor_scale, ARRAY_BLOCKS: tl.constexpr):
    """x fp32 [B, 8], E4M3 bytes int32 [A] -> entries int8 [B, 8]; 0 where the divisor is 0 or NaN."""
    numbers = normalised(x, scale_bytes, tensor_scale, ARRAY_BLOCKS)
    return round_half_even(tl.minimum(tl.maximum(numbers, -LARGEST_INT8), LARGEST_INT8)).to(tl.int8)


@triton.jit
def normalised(x, scale_bytes, tensor_scale, ARRAY_BLOCKS: tl.constexpr):
    """x over its scales, fp32 [B, 8]; 0 where those are 0 or NaN."""
    divisor = e4m3_value(scale_bytes) * tensor_scale  # [A]
    usable = (divisor != 0.0) & (divisor == divisor)
    divisor = tl.where(usable, divisor, float("inf"))
    numbers = tl.div_rn(x, spread(divisor, ARRAY_BLOCKS)[:, None])
    return tl.where(numbers == numbers, numbers, 0.0)  # infinity / infinity


@triton.jit
def buckets(grid):
    """Grid values int32 -> rows of `Lookup`'s tables."""
    return tl.minimum(tl.maximum((grid - 1) >> 3, FIRST), LAST) - FIRST


@triton.jit
def choose_codebooks(grid, bucket, entries, NUM_CODEBOOKS: tl.constexpr):
    """grid and bucket int32 [B, 8], `Lookup.entries` -> selectors int32 [B]."""
    WORDS: tl.constexpr = (NUM_CODEBOOKS + 3) // 4
    selectors = tl.zeros((grid.shape[0],), tl.int32)
    if NUM_CODEBOOKS > 1:
        best = tl.full((grid.shape[0],), 2**31 - 1, tl.int32)
        for k in tl.static_range(NUM_CODEBOOKS):
            if k % 4 == 0:
                word = tl.load(entries + bucket * WORDS + k // 4)
            entry = (word << (24 - 8 * (k % 4))) >> 24  # sign-extended
            cost = tl.sum(entry * ((entry << 3) - grid), axis=1)  # [B], (squared distance - grid**2) / 32
            selectors = tl.where(cost < best, k, selectors)
            best = tl.minimum(cost, best)
    return selectors
