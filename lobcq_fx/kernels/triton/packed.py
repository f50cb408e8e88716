"""Reading packed operands: codes and selectors to codebook entries."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_selectors(selectors, block, num_bytes, valid, SELECTOR_BITS: tl.constexpr):
    """Selectors of blocks of a packed row.

    selectors: uint8 pointer(s) to the start of a row of `num_bytes`. block: int32, which of its blocks. valid: bool.
    Returns int32, the shape of the three broadcast together; 0 where not valid.
    """
    if SELECTOR_BITS == 0:
        chosen = tl.where(valid, block * 0, 0)
    else:
        bit = block * SELECTOR_BITS
        byte = bit >> 3
        window = tl.load(selectors + byte, mask=valid, other=0).to(tl.int32)
        if 8 % SELECTOR_BITS != 0:  # a selector may straddle two bytes
            following = tl.load(selectors + byte + 1, mask=valid & (byte + 1 < num_bytes), other=0)
            window |= following.to(tl.int32) << 8
        chosen = (window >> (bit & 7)) & ((1 << SELECTOR_BITS) - 1)
    return chosen


@triton.jit
def look_up(codebooks, words, selectors):
    """Eight codes a word, int32 [..., B], and selectors int32 [..., B] -> entries int8 [..., B, 8]."""
    code = (tl.expand_dims(words, -1) >> (4 * tl.arange(0, 8))) & 0xF
    # Or, not plus: it goes with the mask into one instruction.
    return tl.load(codebooks + ((tl.expand_dims(selectors, -1) << 4) | code))
