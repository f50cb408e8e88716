"""Linears of groups of activation rows, each with a matrix of its own of a stack; in one launch.

Where groups end is known to the GPU alone, and nothing here waits for it: tables say of each program which group it is
of, as many programs are launched as any groups of so many rows can need, and those that are left over do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.format.spec import FormatSpec
from lobcq_fx.kernels.triton.configs import PrefillConfig
from lobcq_fx.kernels.triton.gemm_tile import tile_sums
from lobcq_fx.kernels.triton.launching import OPTIONS
from lobcq_fx.kernels.triton.operands import Activation
from lobcq_fx.kernels.triton.products import num_terms, operand_type, store_result
from lobcq_fx.kernels.triton.weight_layout import WeightTiles
from lobcq_fx.kernels.triton.weight_tile import COLUMNS


@dataclass(frozen=True)
class Groups:
    """Which rows meet which matrix.

    ends: int32 [E], where each group ends, any numbers (`lobcq_fx.format.stacked.group_bounds`).
    gathered: int64 [S], which rows of the activation the groups are made of; None for all in order.
    """

    ends: Tensor
    gathered: Tensor | None


@triton.jit
def grouped_gemm_kernel(
    x,  # fp32, bf16, fp16 or int8 [T, K]
    x_scales,  # fp32 [T, tiles * 128 / L_A] of int8; or None
    row_scales,  # fp32 [T] or None
    gathered,  # int64 [S] or None
    tile_groups,  # int32 [tiles of rows]: of each tile its group, E where it has none
    tile_rows,  # int32 [tiles of rows]: its first row
    group_ends,  # int32 [E]: the row behind the last
    codes,
    selectors,
    scales,
    codebooks,  # int8 [N_c, 16]
    # 16
    weight_scales,  # fp32 [E]
    out,  # [S, N]
    tokens,
    groups,
    outputs,
    columns,
    row_stride,
    arrays,
    code_stride,  # from matrix to matrix
    selector_stride,
    scale_stride,
    ARRAY: tl.constexpr,
    SELECTOR_BITS: tl.constexpr,
    STEP: tl.constexpr,
    SCALED_WEIGHT: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Program (i, j) makes tile j of the outputs of the i-th tile of rows. NaN where a row does not exist."""
    group = tl.load(tile_groups + tl.program_id(0))
    if group < groups:
        m = tl.load(tile_rows + tl.program_id(0)) + tl.arange(0, TILE_M)
        rows = tl.load(group_ends + group)
        inside = m < rows
        token = m.to(tl.int64) if gathered is None else tl.load(gathered + m, mask=inside, other=0)
        exists = (token >= 0) & (token < tokens)
        token = tl.where(exists, token, 0)
        matrix = group.to(tl.int64)
        ARRAYS: tl.constexpr = COLUMNS // ARRAY
        padded = tl.cdiv(columns, COLUMNS) * ARRAYS
        x_scale_rows = None if x_scales is None else x_scales + token * padded
        total = tile_sums(
            x + token[:, None] * row_stride, x_scale_rows, inside, codes + matrix * code_stride,
            selectors + matrix * selector_stride, scales + matrix * scale_stride, codebooks, tl.program_id(1), outputs,
            columns, arrays, ARRAY, SELECTOR_BITS, STEP, SCALED_WEIGHT, TERMS, OPERAND, TILE_M, TILE_N,
        )  # fmt: skip
        if row_scales is not None:
            total *= tl.load(row_scales + token, mask=inside, other=0.0)[:, None]
        total = tl.where(exists[:, None], total, float("nan"))
        n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
        store_result(total, m[:, None], n[None, :], rows, outputs, None, weight_scales + group, None, None, out)


def grouped_gemm(
    a: Activation, stack: Tensor, scales: Tensor, groups: Groups, outputs: int, codebooks: Tensor, spec: FormatSpec,
    dtype: torch.dtype, config: PrefillConfig | None = None,
) -> Tensor:  # fmt: skip
    """`a[group] @ w[e].T` for each group of rows.

    Args:
        a: T rows.
        stack: uint8 [E, bytes], each matrix [outputs, K] in kernel layout.
        scales: fp32 [E], tensor scales of the matrices.
        groups: which rows they meet.
        outputs: N.
        codebooks: int8 [N_c, 16], the weights'.
        spec: the weights' configuration.
        dtype: of the result.
        config: None takes `default_grouped`.

    Returns:
        [T or S, N]; zeros in the rows of no group, NaN where a gathered row does not exist.

    Raises:
        ValueError: entries with block arrays too small for an integer MMA, or codebooks that are not aligned.
    """
    a.check(codebooks, spec)
    x, experts = a.values, stack.shape[0]
    rows = x.shape[0] if groups.gathered is None else groups.gathered.shape[0]
    out = torch.zeros((rows, outputs), dtype=dtype, device=x.device)
    columns = x.shape[1]
    if out.numel() == 0 or experts == 0 or columns == 0:
        return out
    config = config or default_grouped(rows, experts, x.dtype)
    tile_groups, tile_rows, ends = row_tiles(groups.ends, rows, config.tile_m)
    matrix = WeightTiles.of(stack[0], spec, outputs, columns)
    parts = (matrix.codes, matrix.selectors, matrix.scales)
    scaled_weight = x.dtype == torch.float16
    grouped_gemm_kernel[(tile_groups.shape[0], -(-outputs // config.tile_n))](
        x, a.array_scales, a.row_scales, groups.gathered, tile_groups, tile_rows, ends, *parts, codebooks, scales, out,
        x.shape[0], experts, outputs, columns, x.stride(0), spec.num_arrays(columns),
        *(stack.shape[1] // part.element_size() for part in parts),
        ARRAY=spec.array_size, SELECTOR_BITS=spec.selector_bits,
        STEP=max(1, config.step_columns // spec.array_size) if scaled_weight else 1, SCALED_WEIGHT=scaled_weight,
        TERMS=num_terms(x.dtype), OPERAND=operand_type(x.dtype), TILE_M=config.tile_m, TILE_N=config.tile_n,
        num_warps=config.warps, num_stages=config.stages, **OPTIONS,
    )  # fmt: skip
    return out


def row_tiles(ends: Tensor, rows: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of rows of groups, one after another: of each its group and its first row; and where groups end, in order.

    All int32. As many tiles as any groups of so many rows have at most; those that these do not have are of group E.
    """
    ends = ends.clamp(0, rows).cummax(0).values
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    tiles = (ends - starts + tile_rows - 1) // tile_rows
    last = tiles.cumsum(0)
    place = torch.arange(-(-rows // tile_rows) + len(ends), dtype=last.dtype, device=ends.device)
    group = torch.searchsorted(last, place, right=True)
    known = group.clamp(max=len(ends) - 1)
    first = starts[known] + (place - (last - tiles)[known]) * tile_rows
    return group.int(), first.int(), ends.int()


def default_grouped(rows: int, experts: int, dtype: torch.dtype) -> PrefillConfig:
    """Not measured. Few rows of an expert waste what a taller tile multiplies; larger tiles, or fewer warps, spill."""
    few, one_term = rows <= 16 * experts, num_terms(dtype) == 1
    if few:
        return PrefillConfig(tile_m=16, tile_n=64 if one_term else 32, warps=8)
    return PrefillConfig(tile_m=64, tile_n=64 if one_term else 16, warps=4)
