"""Linears of many activation rows: bound by arithmetic, on integer or on fp16 tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.format.spec import FormatSpec
from lobcq_fx.kernels.triton.e4m3 import e4m3_value
from lobcq_fx.kernels.triton.launching import OPTIONS
from lobcq_fx.kernels.triton.operands import Activation, Epilogue
from lobcq_fx.kernels.triton.packed import line_entries
from lobcq_fx.kernels.triton.products import num_terms, operand_term, operand_type, store_result
from lobcq_fx.kernels.triton.weight_layout import PANEL_ROWS, WeightLines

PANEL = tl.constexpr(PANEL_ROWS)

TILE_M, TILE_N = 128, 64
STEP_COLUMNS = 64
"""Columns multiplied at a time where block arrays need no scaling of their own."""

GROUP = 8
"""Tiles of rows that share a weight tile in L2 while it is there."""


@triton.jit
def prefill_gemm_kernel(
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
    out,  # [M, N]
    rows,
    outputs,
    columns,
    row_stride,
    arrays,
    ARRAY: tl.constexpr,
    SELECTOR_BITS: tl.constexpr,
    STEP: tl.constexpr,
    SCALED_WEIGHT: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program makes one tile [TILE_M, TILE_N] of the result, STEP block arrays at a time.

    SCALED_WEIGHT: the MMA multiplies with entry times scale. Otherwise with entries, and what an array adds is scaled.
    """
    tiles_m, tiles_n = tl.cdiv(rows, TILE_M), tl.cdiv(outputs, TILE_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    group_size = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    m = (group * GROUP + within % group_size) * TILE_M + tl.arange(0, TILE_M)
    n = within // group_size * TILE_N + tl.arange(0, TILE_N)

    # One line for each array of each output: [TILE_N * STEP].
    output = tl.reshape(tl.broadcast_to(n[:, None], (TILE_N, STEP)), (TILE_N * STEP,))
    array = tl.reshape(tl.broadcast_to(tl.arange(0, STEP)[None, :], (TILE_N, STEP)), (TILE_N * STEP,))
    line = (output // PANEL * arrays + array) * PANEL + output % PANEL
    x_rows = x + m.to(tl.int64)[:, None] * row_stride
    k = tl.arange(0, STEP * ARRAY)[None, :]

    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for i in tl.static_range(TERMS):  # the smallest first: least is rounded away
        for first in range(0, arrays, STEP):
            valid = (output < outputs) & (first + array < arrays)
            place = line + first * PANEL
            entries = line_entries(codes, selectors, codebooks, place, valid, ARRAY, SELECTOR_BITS)
            operand = entries.to(OPERAND)  # [TILE_N * STEP, L_A]
            scale = e4m3_value(tl.load(scales + place, mask=valid, other=0).to(tl.int32))
            inside = (m[:, None] < rows) & (first * ARRAY + k < columns)
            values = tl.load(x_rows + first * ARRAY + k, mask=inside, other=0)  # [TILE_M, STEP * L_A]
            term = operand_term(values, TERMS - 1 - i, OPERAND)
            if SCALED_WEIGHT:
                operand *= scale.to(OPERAND)[:, None]  # exact: at most 9 significant bits
                sums = tl.dot(term, tl.trans(tl.reshape(operand, (TILE_N, STEP * ARRAY))), acc=sums)
            else:
                tl.static_assert(STEP == 1, "an array is scaled by itself")
                product = tl.dot(term, tl.trans(operand)).to(tl.float32)
                if x_scales is None:
                    sums += product * scale[None, :]
                else:
                    x_bytes = tl.load(x_scales + m * arrays + first, mask=m < rows, other=0)
                    sums += product * (e4m3_value(x_bytes.to(tl.int32))[:, None] * scale[None, :])

    store_result(sums, m[:, None], n[None, :], rows, outputs, row_scales, weight_scale, bias, residual, out)


def prefill_gemm(
    a: Activation, weight: WeightLines, codebooks: Tensor, spec: FormatSpec, outputs: int, epilogue: Epilogue,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`a @ w.T` and what follows, for any number of rows.

    Entries go to integer MMA instructions, scaled entries and fp16 activations to fp16 ones, bf16 and fp32 ones to
    bf16 ones: whichever multiplies them exactly.

    Args:
        a: M rows.
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
    out = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    scaled_weight = x.dtype == torch.float16
    step = max(1, STEP_COLUMNS // spec.array_size) if scaled_weight else 1
    terms = num_terms(x.dtype)
    tile_m = TILE_M if terms == 1 else TILE_M // 2  # three terms take more registers than one
    prefill_gemm_kernel[(-(-rows // tile_m) * -(-outputs // TILE_N),)](
        x, a.array_scales, weight.codes, weight.selectors, weight.scales, codebooks, a.row_scales,
        epilogue.weight_scale, epilogue.bias, epilogue.residual, out, rows, outputs, columns, x.stride(0),
        spec.num_arrays(columns), ARRAY=spec.array_size, SELECTOR_BITS=spec.selector_bits, STEP=step,
        SCALED_WEIGHT=scaled_weight, TERMS=terms, OPERAND=operand_type(x.dtype),
        TILE_M=tile_m, TILE_N=TILE_N, GROUP=GROUP, num_warps=8, num_stages=3, **OPTIONS,
    )  # fmt: skip
    return out
