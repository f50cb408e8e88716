"""Reading tiles of weights, in the order that `WeightTiles` describes.

Blocks are numbered as they lie in memory: half of a tile's columns v, panel, g, t, row of two, half of those columns i.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lobcq_fx.kernels.triton.byte_lookup import entries_of
from lobcq_fx.kernels.triton.weight_layout import LANE_BLOCKS, LANES, PANEL_ROWS, TILE_COLUMNS

PANEL = tl.constexpr(PANEL_ROWS)
COLUMNS = tl.constexpr(TILE_COLUMNS)
TILE_WORDS = tl.constexpr(LANES * LANE_BLOCKS)
LANE_COUNT = tl.constexpr(LANES)


@triton.jit
def panel_tiles(first_panel, outputs, tiles, panel):
    """Panels, counted from a first one -> their first tiles, int64; beyond the last panel, the last's."""
    return tl.minimum(first_panel + panel, tl.cdiv(outputs, PANEL) - 1).to(tl.int64) * tiles


@triton.jit
def load_lane_selectors(selectors, lane, SELECTOR_BITS: tl.constexpr):
    """What a thread's eight selectors are stored as, in three parts, of lane int64 [L]: not joined, not waited for."""
    if SELECTOR_BITS == 0:
        first = tl.zeros_like(lane).to(tl.int32)
        parts = first, first, first
    elif SELECTOR_BITS == 3:
        parts = tl.load(selectors + lane * 3), tl.load(selectors + lane * 3 + 1), tl.load(selectors + lane * 3 + 2)
    else:
        first = tl.load(selectors + lane)
        parts = first, first, first
    return parts


@triton.jit
def join_lane_selectors(first, second, third, SELECTOR_BITS: tl.constexpr):
    """The parts as int32 [L], the first block's selector in the lowest bits."""
    joined = first.to(tl.int32)
    if SELECTOR_BITS == 3:
        joined |= (second.to(tl.int32) << 8) | (third.to(tl.int32) << 16)
    return joined


@triton.jit
def block_entries(
    codebooks, words, joined, half, part,
    HALVES: tl.constexpr, PARTS: tl.constexpr, SELECTOR_BITS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Entries [B, 8] of words int32 [B], whose threads' selectors are `joined`, [B / (HALVES * 2 * PARTS)].

    Of each thread: HALVES halves of a tile's columns from `half` on, and PARTS parts of those from `part` on.
    """
    THREADS: tl.constexpr = joined.shape[0]
    halves = (half + tl.arange(0, HALVES))[:, None, None, None]
    row = tl.arange(0, 2)[None, None, :, None]
    parts = (part + tl.arange(0, PARTS))[None, None, None, :]
    shifted = tl.reshape(joined, (1, THREADS, 1, 1)) >> ((halves * 4 + row * 2 + parts) * SELECTOR_BITS)
    chosen = tl.reshape(shifted & ((1 << SELECTOR_BITS) - 1), (HALVES * THREADS * 2 * PARTS,))
    return entries_of(codebooks, words, chosen, OPERAND)


@triton.jit
def natural_entries(
    codes, selectors, codebooks, first_panel, outputs, tiles, column,
    WIDTH: tl.constexpr, PANELS: tl.constexpr, SELECTOR_BITS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Entries [PANELS * 16, WIDTH] of a weight from `column` on, a multiple of WIDTH: of 16, 32, 64 or 128."""
    HALVES: tl.constexpr = 2 if WIDTH == 128 else 1
    PARTS: tl.constexpr = 2 if WIDTH >= 64 else 1
    BLOCKS: tl.constexpr = 4 if WIDTH >= 32 else 2  # of a row and a part: one a thread
    PANEL_WORDS: tl.constexpr = 8 * BLOCKS * 2 * PARTS
    half = 0 if HALVES == 2 else column // 64 % 2
    part = 0 if PARTS == 2 else column // 32 % 2
    t = 0 if BLOCKS == 4 else column // 16 % 2 * 2
    tile = column // COLUMNS

    lane = tl.arange(0, PANELS * 8 * BLOCKS)  # panel, g, t
    lane_tile = panel_tiles(first_panel, outputs, tiles, lane // (8 * BLOCKS)) + tile
    lane = lane_tile * LANE_COUNT + lane // BLOCKS % 8 * 4 + t + lane % BLOCKS
    a, b, c = load_lane_selectors(selectors, lane, SELECTOR_BITS)
    joined = join_lane_selectors(a, b, c, SELECTOR_BITS)

    word = tl.arange(0, HALVES * PANELS * PANEL_WORDS)  # half, panel, g, t, row, part
    word_tile = panel_tiles(first_panel, outputs, tiles, word // PANEL_WORDS % PANELS) + tile
    place = (half + word // (PANELS * PANEL_WORDS)) * 128
    if PARTS == 2:
        place += word % PANEL_WORDS
    else:
        place += word % PANEL_WORDS // (2 * BLOCKS) * 16 + (t + word // 2 % BLOCKS) * 4 + word % 2 * 2 + part
    words = tl.load(codes + word_tile * TILE_WORDS + place)

    entries = block_entries(codebooks, words, joined, half, part, HALVES, PARTS, SELECTOR_BITS, OPERAND)
    entries = tl.reshape(entries, (HALVES, PANELS, 8, BLOCKS, 2, PARTS, 8))
    return tl.reshape(tl.permute(entries, (1, 4, 2, 0, 5, 3, 6)), (PANELS * PANEL, WIDTH))
