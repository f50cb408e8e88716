"""Tiles as operands of a batch of products [16, L_A] x [L_A, rows], one an array and panel, with a warp for each panel.

A product's result, like its operands, is spread over a warp as the MMA instruction has it: thread 4 g + t has outputs g
and g + 8, and of every 8 rows 2 t and 2 t + 1. Dimensions are only named anew here, so that nothing moves between
threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lobcq_fx.kernels.triton.e4m3 import e4m3_256th
from lobcq_fx.kernels.triton.weight_tile import COLUMNS, PANEL


@triton.jit
def tile_operand(entries, ARRAY: tl.constexpr, PANELS: tl.constexpr):
    """Entries of tiles [PANELS * 256, 8] -> [128 / L_A * PANELS, 16, L_A].

    Of every 32 columns, 8 t + 4 h + c becomes 16 h + 4 t + c: so each thread has what it multiplies, and
    `activation_operand` orders the activation's columns in the same way.
    """
    ARRAYS: tl.constexpr = COLUMNS // ARRAY
    if ARRAY == 16:  # an array is less than the threads of a row have: let the compiler move entries
        entries = tl.reshape(entries, (2, PANELS, 8, 2, 2, 2, 2, 8))  # v, panel, g, t / 2, t % 2, half, i, c
        entries = tl.permute(entries, (0, 6, 3, 1, 5, 2, 4, 7))
    else:
        entries = tl.reshape(entries, (2, PANELS, 8, 4, 2, 2, 2, 4))  # v, panel, g, t, half, i, h, c
        entries = tl.permute(entries, (0, 5, 1, 4, 2, 6, 3, 7))  # v, i, panel, half, g, h, t, c
        entries = tl.reshape(entries, (ARRAYS, 4 // ARRAYS, PANELS, PANEL, 32))
        entries = tl.permute(entries, (0, 2, 3, 1, 4))
    return tl.reshape(entries, (ARRAYS * PANELS, PANEL, ARRAY))


@triton.jit
def activation_operand(values, ARRAY: tl.constexpr, PANELS: tl.constexpr, ROWS: tl.constexpr):
    """Values [ROWS / 8, 4, 8, 32]: rows, columns, rows, columns -> [128 / L_A * PANELS, L_A, ROWS], for each panel."""
    ARRAYS: tl.constexpr = COLUMNS // ARRAY
    if ARRAY == 16:
        values = tl.permute(tl.reshape(values, (ROWS // 8, 4, 8, 2, 16)), (1, 3, 4, 0, 2))
    else:
        values = tl.reshape(values, (ROWS // 8, ARRAYS, 4 // ARRAYS, 8, 4, 2, 4))  # rows, array, part, rows, t, h, c
        values = tl.permute(values, (1, 2, 5, 4, 6, 0, 3))
    values = tl.broadcast_to(tl.reshape(values, (ARRAYS, 1, ARRAY, ROWS)), (ARRAYS, PANELS, ARRAY, ROWS))
    return tl.reshape(values, (ARRAYS * PANELS, ARRAY, ROWS))


@triton.jit
def weight_scales(words, ARRAYS: tl.constexpr, PANELS: tl.constexpr, ROWS: tl.constexpr):
    """[PANELS * 32, words]: of each thread, two bytes an array -> 256ths of the scales [ARRAYS * PANELS, 16, ROWS]."""
    WORDS: tl.constexpr = words.shape[1]
    bytes_ = tl.reshape(words.to(tl.int32), (PANELS, 8, 4, WORDS, 1)) >> (8 * tl.arange(0, 2 * ARRAYS // WORDS))
    scale = tl.reshape(e4m3_256th(bytes_ & 0xFF), (PANELS, 8, 4, ARRAYS, 2))
    scale = tl.reshape(tl.permute(scale, (3, 0, 4, 1, 2)), (ARRAYS, PANELS, 2, 8, 1, 4, 1))
    return tl.reshape(tl.broadcast_to(scale, (ARRAYS, PANELS, 2, 8, ROWS // 8, 4, 2)), (ARRAYS * PANELS, PANEL, ROWS))


@triton.jit
def activation_scales(scale, ARRAYS: tl.constexpr, PANELS: tl.constexpr, ROWS: tl.constexpr):
    """[2, ROWS / 8, PANELS, 8, 4, ARRAYS]: row % 2, row / 8, panel, g, row / 2 % 4, array -> as `weight_scales`."""
    scale = tl.reshape(tl.permute(scale, (5, 2, 3, 1, 4, 0)), (ARRAYS, PANELS, 1, 8, ROWS // 8, 4, 2))
    return tl.reshape(tl.broadcast_to(scale, (ARRAYS, PANELS, 2, 8, ROWS // 8, 4, 2)), (ARRAYS * PANELS, PANEL, ROWS))
