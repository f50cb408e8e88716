"""Linears of up to 16 activation rows: bound by reading the weight, which is read once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.format.spec import FormatSpec
from lobcq_fx.kernels.triton.e4m3 import e4m3_value
from lobcq_fx.kernels.triton.launching import INTERPRETED, OPTIONS, next_power_of_two
from lobcq_fx.kernels.triton.packed import line_entries
from lobcq_fx.kernels.triton.products import exact_dot, operand_type, store_result
from lobcq_fx.kernels.triton.weight_layout import PANEL_ROWS, WeightLines

MAX_ROWS = 16
PANEL = tl.constexpr(PANEL_ROWS)

STEP_COLUMNS = 512
"""Columns of a panel that a program reads at a time: 4 KB of codes, two 16-byte loads for each of 128 threads."""

ENOUGH_PROGRAMS = 264
"""K is split among programs until there are about as many: two for each multiprocessor of an H100 or H200."""

MAX_SPLITS = 16


@dataclass(frozen=True)
class Epilogue:
    """What follows the sum over K.

    row_scales: fp32 [M] or [M, 1], the activation's tensor scales; None of a float activation.
    weight_scale: fp32 []. bias: [N] or None. residual: [M, N], contiguous, or None, added to the rounded result.
    """

    row_scales: Tensor | None
    weight_scale: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None


@triton.jit
def decode_gemm_kernel(
    x,  # fp32, bf16 or fp16 [M, K]
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
    SPLIT_X: tl.constexpr,
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
        product = exact_dot(values, transposed, SPLIT_X, OPERAND)  # [STEP, 16, PANEL]
        sums += product * tl.reshape(scale, (STEP, 1, PANEL))

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
    x: Tensor, weight: WeightLines, codebooks: Tensor, spec: FormatSpec, outputs: int, epilogue: Epilogue,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`x @ w.T` and what follows.

    Args:
        x: [M, K], M from 1 to 16, the last dimension contiguous: a float activation (W4A16), or the scaled entries of
            an encoded one in fp16 (W4A4; `encode_scaled`).
        weight: of N = `outputs` rows and K columns.
        codebooks: int8 [N_c, 16], the weight's.
        spec: the weight's configuration.
        outputs: N.
        epilogue: scales, bias and residual.
        dtype: of the result.

    Returns:
        [M, N].
    """
    rows, columns = x.shape
    split_x = x.dtype == torch.float32
    step = STEP_COLUMNS // spec.array_size // (2 if split_x else 1)  # three terms take more registers than one
    panels = -(-outputs // PANEL_ROWS)
    splits = num_splits(panels, -(-spec.num_arrays(columns) // step))
    out = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    sums = out if splits == 1 else torch.empty((splits, rows, outputs), device=x.device)
    tail = (epilogue.row_scales, epilogue.weight_scale, epilogue.bias, epilogue.residual)
    decode_gemm_kernel[(panels, splits)](
        x, weight.codes, weight.selectors, weight.scales, codebooks, *tail, sums, rows, outputs, columns, x.stride(0),
        spec.num_arrays(columns), ARRAY=spec.array_size, SELECTOR_BITS=spec.selector_bits, STEP=step,
        SPLIT_X=split_x, OPERAND=operand_type(x.dtype, INTERPRETED), SPLITS=splits, num_warps=4,
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
