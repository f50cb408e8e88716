"""Linears of many activation rows: bound by arithmetic, on integer or on fp16 tensor cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.format.spec import FormatSpec
from lobcq_fx.kernels.triton.configs import PrefillConfig, Shape, prefill_config
from lobcq_fx.kernels.triton.gemm_tile import tile_sums
from lobcq_fx.kernels.triton.launching import OPTIONS
from lobcq_fx.kernels.triton.operands import Activation, Linear
from lobcq_fx.kernels.triton.products import num_terms, operand_type, store_result
from lobcq_fx.kernels.triton.weight_tile import COLUMNS


@triton.jit
def prefill_gemm_kernel(
    x,  # fp32, bf16, fp16 or int8 [M, K]
    x_scales,  # fp32 [M, tiles * 128 / L_A] of int8; or None
    codes,
    selectors,
    scales,
    codebooks,  # int8 [N_c, 16]
    # 16
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
    """Each program makes one tile [TILE_M, TILE_N] of the result."""
    tiles_m, tiles_n = tl.cdiv(rows, TILE_M), tl.cdiv(outputs, TILE_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    group_size = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    m = (group * GROUP + within % group_size) * TILE_M + tl.arange(0, TILE_M)
    n_tile = within // group_size
    n = n_tile * TILE_N + tl.arange(0, TILE_N)

    x_rows = x + m.to(tl.int64)[:, None] * row_stride
    x_scale_rows = None if x_scales is None else x_scales + m * (tl.cdiv(columns, COLUMNS) * (COLUMNS // ARRAY))
    sums = tile_sums(
        x_rows, x_scale_rows, m < rows, codes, selectors, scales, codebooks, n_tile, outputs, columns, arrays,
        ARRAY, SELECTOR_BITS, STEP, SCALED_WEIGHT, TERMS, OPERAND, TILE_M, TILE_N,
    )  # fmt: skip
    store_result(sums, m[:, None], n[None, :], rows, outputs, row_scales, weight_scale, bias, residual, out)


def prefill_gemm(
    a: Activation, linears: Sequence[Linear], codebooks: Tensor, spec: FormatSpec, dtype: torch.dtype,
    config: PrefillConfig | None = None,
) -> list[Tensor]:  # fmt: skip
    """`a @ w.T` and what follows, for each weight and any number of rows; a launch each, which fills a GPU.

    Entries go to integer MMA instructions, scaled entries and fp16 activations to fp16 ones, bf16 and fp32 ones to
    bf16 ones: whichever multiplies them exactly.

    Args:
        a: M rows.
        linears: any number.
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
    for linear, out in zip(linears, outs, strict=True):
        if out.numel() > 0:
            shape = Shape.of(a.values, linear.outputs, spec)
            _launch(a, linear, codebooks, spec, config or prefill_config(shape, a.values.device), out)
    return outs


def _launch(
    a: Activation, linear: Linear, codebooks: Tensor, spec: FormatSpec, config: PrefillConfig, out: Tensor
) -> None:
    x, weight, epilogue = a.values, linear.weight, linear.epilogue
    rows, columns = x.shape
    scaled_weight = x.dtype == torch.float16
    step = max(1, config.step_columns // spec.array_size) if scaled_weight else 1
    prefill_gemm_kernel[(-(-rows // config.tile_m) * -(-linear.outputs // config.tile_n),)](
        x, a.array_scales, weight.codes, weight.selectors, weight.scales, codebooks, a.row_scales,
        epilogue.weight_scale, epilogue.bias, epilogue.residual, out, rows, linear.outputs, columns, x.stride(0),
        spec.num_arrays(columns), ARRAY=spec.array_size, SELECTOR_BITS=spec.selector_bits, STEP=step,
        SCALED_WEIGHT=scaled_weight, TERMS=num_terms(x.dtype), OPERAND=operand_type(x.dtype),
        TILE_M=config.tile_m, TILE_N=config.tile_n, GROUP=config.group,
        num_warps=config.warps, num_stages=config.stages, **OPTIONS,
    )  # fmt: skip
