"""What the GEMM kernels multiply, and what follows the sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lobcq_fx.kernels.triton.floats import narrow, widen
from lobcq_fx.kernels.triton.launching import INTERPRETED

ADDED_PLAINLY = tl.constexpr(INTERPRETED)
"""The interpreter runs no PTX, and fuses nothing."""

ADD_ASM = tl.constexpr("add.rn.f32 $0, $1, $2;")


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which the MMA multiplies activations of a dtype with entries: one that holds both exactly.

    The interpreter multiplies no bf16 (it takes its bits for integers): there bf16 goes in as fp32, the same numbers.
    """
    if dtype in (torch.int8, torch.float16):
        return tl.int8 if dtype == torch.int8 else tl.float16
    return tl.float32 if INTERPRETED else tl.bfloat16


def num_terms(dtype: torch.dtype) -> int:
    """How many operands an activation of a dtype is the sum of: fp32 is three bf16 numbers, of 8 bits each."""
    return 3 if dtype == torch.float32 else 1


@triton.jit
def leading_term(x):
    """fp32 -> its leading 8 significant bits, in fp32."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def operand_term(x, TERM: tl.constexpr, OPERAND: tl.constexpr):
    """Term TERM, the largest first, of an activation as operand of an MMA."""
    if x.dtype == tl.float32:
        for _ in tl.static_range(TERM):
            x -= leading_term(x)
        term = leading_term(x).to(OPERAND)
    elif x.dtype == OPERAND:
        term = x
    else:
        term = widen(x)
    return term


@triton.jit
def add_apart(x, y):
    """`x + y`, fp32, of an x that stays rounded: PTX's `add.f32` may be fused with the product before it."""
    if ADDED_PLAINLY:
        result = x + y
    else:
        result = tl.inline_asm_elementwise(ADD_ASM, "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def store_result(product, m, n, rows, outputs, row_scales, weight_scale, bias, residual, out):
    """`(product * t_m) * t_w + bias`, rounded to out's dtype, and `+ residual`, rounded again: as the graph adds it.

    product: fp32. m, n: int32, the row and the output that each element is of, broadcastable to it.
    row_scales: fp32 [M] or None. weight_scale: fp32 []. bias: [N] or None. residual: [M, N] or None. out: [M, N].
    """
    inside = (m < rows) & (n < outputs)
    offset = m.to(tl.int64) * outputs + n
    if row_scales is not None:
        product *= tl.load(row_scales + m, mask=m < rows, other=0.0)
    product *= tl.load(weight_scale)
    if bias is not None:
        product += widen(tl.load(bias + n, mask=n < outputs, other=0.0))
    result = narrow(product, out.dtype.element_ty)
    if residual is not None:
        more = widen(tl.load(residual + offset, mask=inside, other=0.0))
        result = narrow(add_apart(widen(result), more), out.dtype.element_ty)
    tl.store(out + offset, result, mask=inside)
