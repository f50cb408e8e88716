"""bf16 to fp32 and back in integers: what GPUs do, and the interpreter of Triton does not (it loses subnormals and
truncates)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """fp32, bf16 or fp16 -> fp32, exact."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 -> dtype (fp32, bf16 or fp16), nearest even."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN must not be carried over to another number.
        result = tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result
