"""Linears of up to 16 activation rows: bound by reading the weight, which is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.format.spec import FormatSpec
from lobcq_fx.kernels.triton.e4m3 import e4m3_value
from lobcq_fx.kernels.triton.launching import OPTIONS, next_power_of_two
from lobcq_fx.kernels.triton.operands import Activation, Epilogue
from lobcq_fx.kernels.triton.packed import line_entries
from lobcq_fx.kernels.triton.products import num_terms, operand_term, operand_type, store_result
from lobcq_fx.kernels.triton.weight_layout import PANEL_ROWS, WeightLines

MAX_ROWS = 16
PANEL = tl.constexpr(PANEL_ROWS)

STEP_COLUMNS = 512
"""Columns of a panel that a program reads at a time: 4 KB of codes, two 16-byte loads for each of 128 threads."""

ENOUGH_PROGRAMS = 264
"""K is split among programs until there are about as many: two for each multiprocessor of an H100 or H200."""

MAX_SPLITS = 16


@triton.jit
def decode_gemm_kernel(
    x,  # fp32, bf16, fp16 or int8 [M, K]
    x_scales,  # uint8 [M, arrays] of int8; or None
    codes,  # int32 [lines, L_A / 8]
    selectors,  # uint8 [lines, selector bytes]
    scales,  # uint8 [lines]
    codebooks,  # int8 [N_c, 16]
    row_scales,
    weight_scale,
    bias,
    residual,
    out,  # [M, N]; with several splits fp32 [SPLITS, M, N], sums that await `sum_splits_kernel`
    rows,
    outputs,
    columns,
    row_stride,
    arrays,
    ARRAY: tl.constexpr,
    SELECTOR_BITS: tl.constexpr,
    STEP: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (p, s) multiplies panel p with every SPLITS-th step of STEP block arrays, from the s-th on.

    Each array of a step is a matrix of a batch, so that warps share K among them rather than the few rows.
    """
    panel = tl.program_id(0)
    m = tl.arange(0, 16)
    array = tl.arange(0, STEP)
    line = tl.arange(0, STEP * PANEL)
    column = array[:, None, None] * ARRAY + tl.arange(0, ARRAY)[None, None, :]  # [STEP, 1, L_A]

    sums = tl.zeros((STEP, 16, PANEL), tl.float32)
    for first in range(tl.program_id(1) * STEP, arrays, SPLITS * STEP):
        valid = line // PANEL + first < arrays
        place = (panel * arrays + first) * PANEL + line  # a step's lines lie side by side
        entries = line_entries(codes, selectors, codebooks, place, valid, ARRAY, SELECTOR_BITS)
        scale = e4m3_value(tl.load(scales + place, mask=valid, other=0).to(tl.int32))

        k = first * ARRAY + column
        inside = (m[None, :, None] < rows) & (k < columns)
        values = tl.load(x + m[None, :, None] * row_stride + k, mask=inside, other=0.0)  # [STEP, 16, L_A]
        transposed = tl.permute(tl.reshape(entries, (STEP, PANEL, ARRAY)), (0, 2, 1))  # [STEP, L_A, PANEL]
        operand = transposed.to(OPERAND)
        product = tl.dot(operand_term(values, TERMS - 1, OPERAND), operand)  # [STEP, 16, PANEL]
        for i in tl.static_range(1, TERMS):  # the smallest first: least is rounded away
            product = tl.dot(operand_term(values, TERMS - 1 - i, OPERAND), operand, acc=product)
        scale = tl.reshape(scale, (STEP, 1, PANEL))
        if x_scales is not None:
            inside = (m[None, :] < rows) & (first + array[:, None] < arrays)
            x_bytes = tl.load(x_scales + m[None, :] * arrays + first + array[:, None], mask=inside, other=0)
            scale = e4m3_value(x_bytes.to(tl.int32))[:, :, None] * scale
        sums += product.to(tl.float32) * scale

    total = tl.sum(sums, axis=0)  # [16, PANEL]
    n = panel * PANEL + tl.arange(0, PANEL)
    if SPLITS == 1:
        store_result(total, m[:, None], n[None, :], rows, outputs, row_scales, weight_scale, bias, residual, out)
    else:
        place = (tl.program_id(1) * rows + m[:, None]) * outputs + n[None, :]
        tl.store(out + place, total, mask=(m[:, None] < rows) & (n[None, :] < outputs))


@triton.jit
def sum_splits_kernel(
    sums,  # fp32 [SPLITS, M, N]
    row_scales,
    weight_scale,
    bias,
    residual,
    out,  # [M, N]
    rows,
    outputs,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (m, i) adds the splits of tile i of row m, in order: the same bits on every run."""
    m = tl.zeros((TILE,), tl.int32) + tl.program_id(0)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + (split * rows + m) * outputs + n, mask=n < outputs, other=0.0)
    store_result(total, m, n, rows, outputs, row_scales, weight_scale, bias, residual, out)


def decode_gemm(
    a: Activation, weight: WeightLines, codebooks: Tensor, spec: FormatSpec, outputs: int, epilogue: Epilogue,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`a @ w.T` and what follows.

    Args:
        a: of 16 rows at most.
        weight: of N = `outputs` rows and a's columns.
        codebooks: int8 [N_c, 16], the weight's.
        spec: the weight's configuration.
        outputs: N.
        epilogue: scale, bias and residual.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: entries with block arrays too small for an integer MMA.
    """
    a.check(spec)
    x = a.values
    rows, columns = x.shape
    terms = num_terms(x.dtype)
    step = STEP_COLUMNS // spec.array_size
    panels = -(-outputs // PANEL_ROWS)
    splits = num_splits(panels, -(-spec.num_arrays(columns) // step))
    out = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    sums = out if splits == 1 else torch.empty((splits, rows, outputs), device=x.device)
    tail = (a.row_scales, epilogue.weight_scale, epilogue.bias, epilogue.residual)
    decode_gemm_kernel[(panels, splits)](
        x, a.array_scales, weight.codes, weight.selectors, weight.scales, codebooks, *tail, sums, rows, outputs,
        columns, x.stride(0), spec.num_arrays(columns), ARRAY=spec.array_size, SELECTOR_BITS=spec.selector_bits,
        STEP=step, TERMS=terms, OPERAND=operand_type(x.dtype), SPLITS=splits,
        num_warps=4 if terms == 1 else 8,  # three terms take more registers than one
        num_stages=3, **OPTIONS,
    )  # fmt: skip
    if splits > 1:
        tile = 256
        sum_splits_kernel[(rows, -(-outputs // tile))](
            sums, *tail, out, rows, outputs, SPLITS=splits, TILE=tile, num_warps=4, **OPTIONS
        )
    return out


def num_splits(panels: int, steps: int) -> int:
    """A power of two up to 16: among how many programs to split each panel's steps."""
    wanted = max(1, min(ENOUGH_PROGRAMS // max(1, panels), steps, MAX_SPLITS))
    return next_power_of_two(wanted + 1) // 2
