"""Linears of up to 16 activation rows: bound by reading the weight, which is read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.format.spec import FormatSpec
from lobcq_fx.kernels.triton.configs import DecodeConfig, Shape, decode_config
from lobcq_fx.kernels.triton.fragments import activation_operand, activation_scales, tile_operand, weight_scales
from lobcq_fx.kernels.triton.launching import OPTIONS, next_power_of_two
from lobcq_fx.kernels.triton.operands import Activation, Linear
from lobcq_fx.kernels.triton.products import num_terms, operand_term, operand_type, store_result
from lobcq_fx.kernels.triton.weight_layout import num_panels, num_tiles
from lobcq_fx.kernels.triton.weight_tile import (
    COLUMNS,
    LANE_COUNT,
    PANEL,
    TILE_WORDS,
    block_entries,
    join_lane_selectors,
    load_lane_selectors,
    panel_tiles,
)

MAX_ROWS = 16


@triton.jit
def multiply_panels(
    x,
    x_scales,
    codebooks,
    codes,
    selectors,
    scales,
    panel,  # the first of PANELS
    outputs,
    first,  # tile, and every STRIDE-th from there on
    rows,
    columns,
    row_stride,
    tiles,
    ARRAY: tl.constexpr,
    SELECTOR_BITS: tl.constexpr,
    PANELS: tl.constexpr,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
    STRIDE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The sums over K of PANELS panels' outputs and ROWS rows of x, fp32 [PANELS * 16, ROWS].

    Small numbers are loaded for the next tile while this one is multiplied; the compiler does so with large ones.
    """
    ARRAYS: tl.constexpr = COLUMNS // ARRAY
    BATCH: tl.constexpr = ARRAYS * PANELS
    word = tl.arange(0, 2 * PANELS * 128)  # half of the columns, panel, thread, block
    lane = tl.arange(0, PANELS * LANE_COUNT)
    SCALE_WORDS: tl.constexpr = max(1, ARRAYS // 2)
    word_tile = panel_tiles(panel, outputs, tiles, word // 128 % PANELS)
    lane_tile = panel_tiles(panel, outputs, tiles, lane // LANE_COUNT)
    word = word_tile * TILE_WORDS + word // (PANELS * 128) * 128 + word % 128
    scale = (lane_tile * 8 + lane % LANE_COUNT // 4)[:, None] * SCALE_WORDS + tl.arange(0, SCALE_WORDS)[None, :]
    lane = lane_tile * LANE_COUNT + lane % LANE_COUNT

    # Of x: rows / 8, columns / 32, rows % 8, columns % 32. Of its scales: as `activation_scales` wants them.
    m = tl.arange(0, ROWS // 8)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]
    k = tl.arange(0, 4)[None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :]
    if x_scales is not None:
        x_scale_m = tl.arange(0, ROWS // 8)[None, :, None, None, None, None] * 8 + (
            2 * tl.arange(0, 4)[None, None, None, None, :, None] + tl.arange(0, 2)[:, None, None, None, None, None]
        )
        every = tl.arange(0, PANELS)[:, None] + tl.arange(0, 8)[None, :]  # panels and g have the same scales
        x_array = tl.arange(0, ARRAYS)[None, None, None, None, None, :] + 0 * every[None, None, :, :, None, None]
        # Beyond the last row any will do.
        x_scale_place = tl.minimum(x_scale_m, rows - 1) * (tiles * ARRAYS) + x_array
        next_x_scale = tl.load(x_scales + x_scale_place + first * ARRAYS)

    sums = tl.zeros((BATCH, PANEL, ROWS), tl.float32)
    next_a, next_b, next_c = load_lane_selectors(selectors, lane + first * LANE_COUNT, SELECTOR_BITS)
    next_scale = tl.load(scales + scale + first * (8 * SCALE_WORDS))
    for tile in tl.range(first, tiles, STRIDE, loop_unroll_factor=UNROLL):
        following = tl.minimum(tile + STRIDE, tiles - 1)
        chosen = join_lane_selectors(next_a, next_b, next_c, SELECTOR_BITS)
        next_a, next_b, next_c = load_lane_selectors(selectors, lane + following * LANE_COUNT, SELECTOR_BITS)
        scaled = weight_scales(next_scale, ARRAYS, PANELS, ROWS)
        next_scale = tl.load(scales + scale + following * (8 * SCALE_WORDS))
        if x_scales is None:
            scaled *= 256.0
        else:
            scaled *= activation_scales(next_x_scale, ARRAYS, PANELS, ROWS)
            next_x_scale = tl.load(x_scales + x_scale_place + following * ARRAYS)

        words = tl.load(codes + word + tile * TILE_WORDS)
        entries = block_entries(codebooks, words, chosen, 0, 0, 2, 2, SELECTOR_BITS, OPERAND)
        operand = tile_operand(entries, ARRAY, PANELS)  # [BATCH, 16, L_A]
        inside = (m < rows) & (tile * COLUMNS + k < columns)
        values = tl.load(x + m * row_stride + tile * COLUMNS + k, mask=inside, other=0)
        SUM: tl.constexpr = tl.int32 if OPERAND.is_int8() else tl.float32
        product = tl.zeros((BATCH, PANEL, ROWS), SUM)
        for i in tl.static_range(TERMS):  # the smallest first: least is rounded away
            term = activation_operand(operand_term(values, TERMS - 1 - i, OPERAND), ARRAY, PANELS, ROWS)
            product = tl.dot(operand, term, acc=product, out_dtype=SUM)  # not every Triton takes it from acc
        sums += product.to(tl.float32) * scaled

    total = tl.sum(tl.reshape(sums, (ARRAYS, PANELS, PANEL, ROWS)), axis=0)
    if x_scales is not None:
        total *= 256.0
    return tl.reshape(total, (PANELS * PANEL, ROWS))


@triton.jit
def decode_gemm_kernel(
    x,  # fp32, bf16, fp16 or int8 [M, K]
    x_scales,  # fp32 [M, tiles * 128 / L_A] of int8; or None
    row_scales,
    codebooks,  # int8 [N_c, 16]
    weights,  # of each: codes, selectors, scales; weight scale, bias, residual; out [M, N] and N. With several splits
    # out is fp32 [SPLITS, M, N], sums that await `sum_splits_kernel`
    rows,
    columns,
    row_stride,
    ARRAY: tl.constexpr,
    SELECTOR_BITS: tl.constexpr,
    PANELS: tl.constexpr,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
    SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Program (p, s) multiplies the p-th PANELS panels of all weights with every SPLITS-th tile, from the s-th on."""
    m = tl.arange(0, ROWS)[None, :]
    tiles = tl.cdiv(columns, COLUMNS)
    begin = 0
    for i in tl.static_range(COUNT):
        codes, selectors, scales, weight_scale, bias, residual, out, outputs = weights[i]
        end = begin + tl.cdiv(outputs, PANELS * PANEL)
        if (tl.program_id(0) >= begin) & (tl.program_id(0) < end):
            panel = (tl.program_id(0) - begin) * PANELS
            total = multiply_panels(
                x, x_scales, codebooks, codes, selectors, scales, panel, outputs, tl.program_id(1), rows, columns,
                row_stride, tiles, ARRAY, SELECTOR_BITS, PANELS, ROWS, TERMS, OPERAND, SPLITS, UNROLL,
            )  # fmt: skip
            n = panel * PANEL + tl.arange(0, PANELS * PANEL)[:, None]
            if SPLITS == 1:
                store_result(total, m, n, rows, outputs, row_scales, weight_scale, bias, residual, out)
            else:
                place = (tl.program_id(1) * rows + m) * outputs + n
                tl.store(out + place, total, mask=(m < rows) & (n < outputs))
        begin = end


@triton.jit
def sum_splits_kernel(
    row_scales,
    weights,  # of each: sums fp32 [SPLITS, M, N]; weight scale, bias, residual; out [M, N] and N
    rows,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Program (m, i) adds the splits of the i-th tile of row m, in order: the same bits on every run."""
    m = tl.zeros((TILE,), tl.int32) + tl.program_id(0)
    begin = 0
    for i in tl.static_range(COUNT):
        sums, weight_scale, bias, residual, out, outputs = weights[i]
        end = begin + tl.cdiv(outputs, TILE)
        if (tl.program_id(1) >= begin) & (tl.program_id(1) < end):
            n = (tl.program_id(1) - begin) * TILE + tl.arange(0, TILE)
            total = tl.zeros((TILE,), tl.float32)
            for split in tl.static_range(SPLITS):
                total += tl.load(sums + (split * rows + m) * outputs + n, mask=n < outputs, other=0.0)
            store_result(total, m, n, rows, outputs, row_scales, weight_scale, bias, residual, out)
        begin = end


MAX_WEIGHTS = 4
"""Weights of one launch: each is a copy of the kernel's code."""

SUM_TILE = 256

MAX_REGISTERS = 168
"""For more than 8 rows of integers: three programs of four warps a multiprocessor.

Left to itself ptxas stops at 128, for a fourth, and spills.
"""


def decode_gemm(
    a: Activation, linears: Sequence[Linear], codebooks: Tensor, spec: FormatSpec, dtype: torch.dtype,
    config: DecodeConfig | None = None,
) -> list[Tensor]:  # fmt: skip
    """`a @ w.T` and what follows, for each weight.

    Args:
        a: of 16 rows at most, and a column at least: a tile of each weight is loaded before any is counted.
        linears: any number; up to four go into one launch.
        codebooks: int8 [N_c, 16], the weights'.
        spec: the weights' configuration.
        dtype: of the results.
        config: of every launch; None takes what was chosen for its shape.

    Returns:
        [M, N] of each.

    Raises:
        ValueError: entries with block arrays too small for an integer MMA, or codebooks that are not aligned.
    """
    a.check(codebooks, spec)
    shapes = [(a.values.shape[0], linear.outputs) for linear in linears]
    outs = [torch.empty(shape, dtype=dtype, device=a.values.device) for shape in shapes]
    wanted = [(linear, out) for linear, out in zip(linears, outs, strict=True) if out.numel() > 0]
    for begin in range(0, len(wanted), MAX_WEIGHTS):
        some = wanted[begin : begin + MAX_WEIGHTS]
        shape = Shape.of(a.values, sum(linear.outputs for linear, _ in some), spec)
        _launch(a, some, codebooks, spec, config or decode_config(shape, a.values.device))
    return outs


def _launch(
    a: Activation, wanted: Sequence[tuple[Linear, Tensor]], codebooks: Tensor, spec: FormatSpec, config: DecodeConfig
) -> None:
    rows, columns = a.values.shape
    sizes = [linear.outputs for linear, _ in wanted]
    programs = sum(-(-num_panels(n) // config.panels) for n in sizes)
    splits = num_splits(programs, num_tiles(columns), config)
    sums = [out if splits == 1 else out.new_empty((splits, *out.shape), dtype=torch.float32) for _, out in wanted]
    tails = [(e.weight_scale, e.bias, e.residual) for e in (linear.epilogue for linear, _ in wanted)]
    operands = [(linear.weight.codes, linear.weight.selectors, linear.weight.scales) for linear, _ in wanted]
    decode_gemm_kernel[(programs, splits)](
        a.values, a.array_scales, a.row_scales, codebooks,
        tuple((*w, *tail, out, n) for w, tail, out, n in zip(operands, tails, sums, sizes, strict=True)),
        rows, columns, a.values.stride(0), ARRAY=spec.array_size, SELECTOR_BITS=spec.selector_bits,
        PANELS=config.panels, ROWS=8 if rows <= 8 else 16, TERMS=num_terms(a.values.dtype),
        OPERAND=operand_type(a.values.dtype), SPLITS=splits, UNROLL=config.unroll, COUNT=len(wanted),
        num_warps=config.panels, num_stages=config.stages,
        maxnreg=MAX_REGISTERS if rows > 8 and a.array_scales is not None else None, **OPTIONS,
    )  # fmt: skip
    if splits > 1:
        outs = (out for _, out in wanted)
        sum_splits_kernel[(rows, sum(-(-n // SUM_TILE) for n in sizes))](
            a.row_scales, tuple((s, *tail, out, n) for s, tail, out, n in zip(sums, tails, outs, sizes, strict=True)),
            rows, SPLITS=splits, TILE=SUM_TILE, COUNT=len(wanted), num_warps=4, **OPTIONS,
        )  # fmt: skip


def num_splits(programs: int, tiles: int, config: DecodeConfig) -> int:
    """A power of two: among how many programs to split each panel's tiles."""
    wanted = max(1, min(config.enough_programs // max(1, programs), tiles, config.max_splits))
    return next_power_of_two(wanted + 1) // 2
