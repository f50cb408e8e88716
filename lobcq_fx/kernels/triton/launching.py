"""What all launches share."""

from __future__ import annotations

import triton

OPTIONS = {"enable_fp_fusion": True}
"""Fused multiply-adds change no encoded byte: no product that is rounded is added to anything."""

ROUNDED_APART = {"enable_fp_fusion": False}
"""For prologues, whose rules round products that are then added to something: LayerNorm's before the bias, for one."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter: decided, as they are, when they are defined."""


def next_power_of_two(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()
