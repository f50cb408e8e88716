"""E4M3 in integer and fp16 arithmetic: sm_80 has no conversions of it, and those of later GPUs saturate differently."""

from __future__ import annotations

import triton
import triton.language as tl

from lobcq_fx.format.spec import E4M3_MAX, E4M3_MIN_SUBNORMAL

NAN_BYTE = tl.constexpr(0x7F)
LARGEST = tl.constexpr(E4M3_MAX)
SMALLEST = tl.constexpr(E4M3_MIN_SUBNORMAL)
SMALLEST_NORMAL = tl.constexpr(2.0**-6)
STEPS = tl.constexpr(1 / E4M3_MIN_SUBNORMAL)

ROUNDS_TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""x + this - this is x rounded half to even, for |x| <= 2**22: fp32 has no fraction bits at that magnitude."""


@triton.jit
def round_half_even(x):
    """fp32, magnitudes up to 2**22 -> the nearest integer as int32."""
    return ((x + ROUNDS_TO_INTEGER) - ROUNDS_TO_INTEGER).to(tl.int32)


@triton.jit
def e4m3_byte(x, UP: tl.constexpr = False):
    """fp32, positive -> E4M3 bytes as int32, nearest even or rounded up, clamped to [2**-9, 448]."""
    x = tl.minimum(tl.maximum(x, SMALLEST), LARGEST)
    bits = x.to(tl.int32, bitcast=True)
    # Twenty of fp32's fraction bits go; a carry into the exponent is right as it stands. The biases are 127 and 7.
    normal = ((bits + (0xFFFFF if UP else 0x7FFFF + ((bits >> 20) & 1))) >> 20) - ((127 - 7) << 3)
    subnormal = round_half_even(x * STEPS)
    if UP:
        subnormal += (subnormal.to(tl.float32) < x * STEPS).to(tl.int32)
    return tl.where(x < SMALLEST_NORMAL, subnormal, normal)


@triton.jit
def e4m3_value(byte):
    """E4M3 bytes, int32, none negative -> fp32, exact. By way of fp16, whose subnormals no GPU flushes."""
    return tl.where(byte == NAN_BYTE, float("nan"), e4m3_256th(byte) * 256.0)


@triton.jit
def e4m3_256th(byte):
    """E4M3 bytes, int32, none negative or NaN -> a 256th of them in fp32, exact."""
    return (byte << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
