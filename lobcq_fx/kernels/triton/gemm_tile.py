"""One tile of a linear of many rows, whichever rows they are and whichever weight they meet."""

from __future__ import annotations

import triton
import triton.language as tl

from lobcq_fx.kernels.triton.e4m3 import e4m3_256th
from lobcq_fx.kernels.triton.products import operand_term
from lobcq_fx.kernels.triton.weight_tile import COLUMNS, PANEL, natural_entries, panel_tiles


@triton.jit
def tile_sums(
    x_rows,  # pointers [TILE_M, 1] to rows of fp32, bf16, fp16 or int8
    x_scale_rows,  # pointers [TILE_M] to the array scales of int8 rows, fp32; or None
    rows_inside,  # [TILE_M]
    codes,
    selectors,
    scales,
    codebooks,  # int8 [N_c, 16]
    n_tile,
    outputs,
    columns,
    arrays,
    ARRAY: tl.constexpr,
    SELECTOR_BITS: tl.constexpr,
    STEP: tl.constexpr,
    SCALED_WEIGHT: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """The sums over K of rows and the TILE_N outputs of a weight's tile `n_tile`, STEP block arrays at a time; fp32.

    SCALED_WEIGHT: the MMA multiplies with entry times scale. Otherwise with entries, and what an array adds is scaled.
    """
    PANELS: tl.constexpr = TILE_N // PANEL
    ARRAYS: tl.constexpr = COLUMNS // ARRAY
    tiles = tl.cdiv(columns, COLUMNS)
    first_panel = n_tile * PANELS
    # Of each output and each array of a step: where a tile's scales have it.
    output = tl.arange(0, TILE_N)[:, None]
    scale_tile = panel_tiles(first_panel, outputs, tiles, output // PANEL)
    byte_scales = scales.to(tl.pointer_type(tl.uint8), bitcast=True)
    output_scales = byte_scales + scale_tile * (PANEL * ARRAYS) + output % 8 * (2 * ARRAYS) + output // 8 % 2
    k = tl.arange(0, STEP * ARRAY)[None, :]

    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for i in tl.static_range(TERMS):  # the smallest first: least is rounded away
        for first in range(0, arrays, STEP):
            operand = natural_entries(
                codes, selectors, codebooks, first_panel, outputs, tiles, first * ARRAY,
                STEP * ARRAY, PANELS, SELECTOR_BITS, OPERAND,
            )  # fmt: skip
            array = first + tl.arange(0, STEP)[None, :]
            place = array // ARRAYS * (PANEL * ARRAYS) + array % ARRAYS * 2
            scale = e4m3_256th(tl.load(output_scales + place).to(tl.int32))  # [TILE_N, STEP]
            inside = rows_inside[:, None] & (first * ARRAY + k < columns)
            values = tl.load(x_rows + first * ARRAY + k, mask=inside, other=0)  # [TILE_M, STEP * L_A]
            term = operand_term(values, TERMS - 1 - i, OPERAND)
            if SCALED_WEIGHT:
                operand = tl.reshape(operand, (TILE_N, STEP, ARRAY)) * (scale * 256.0).to(OPERAND)[:, :, None]
                operand = tl.reshape(operand, (TILE_N, STEP * ARRAY))  # exact: at most 9 significant bits
                sums = tl.dot(term, tl.trans(operand), acc=sums)
            else:
                tl.static_assert(STEP == 1, "an array is scaled by itself")
                product = tl.dot(term, tl.trans(operand)).to(tl.float32)
                scale = tl.reshape(scale, (1, TILE_N))
                if x_scale_rows is None:
                    scale *= 256.0
                else:
                    scale = tl.load(x_scale_rows + first, mask=rows_inside, other=0)[:, None] * scale
                sums += product * scale

    if x_scale_rows is not None:
        sums *= 256.0
    return sums
