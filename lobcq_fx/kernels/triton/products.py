"""Products of floats and codebook entries without rounding, and what follows a sum of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lobcq_fx.kernels.triton.floats import narrow, widen


def operand_type(dtype: torch.dtype, interpreted: bool) -> tl.dtype:
    """The type in which the MMA multiplies activations of a dtype: fp32 goes in as three bf16 terms.

    The interpreter multiplies no bf16 (it takes its bits for integers): there bf16 goes in as fp32, the same numbers.
    """
    if dtype == torch.float16:
        return tl.float16
    return tl.float32 if interpreted else tl.bfloat16


@triton.jit
def leading_term(x):
    """fp32 -> its leading 8 significant bits, in fp32: a bf16 number."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def exact_dot(x, entries, SPLIT: tl.constexpr, OPERAND: tl.constexpr):
    """Activations [..., M, K] times entries int8 [..., K, N], multiplied exactly and summed in fp32.

    SPLIT: x is fp32, and goes in as three terms of 8 bits each, 24 in all. Otherwise OPERAND holds x exactly.
    """
    w = entries.to(OPERAND)
    if SPLIT:
        high = leading_term(x)
        middle = leading_term(x - high)
        low = (x - high) - middle
        product = tl.dot(high.to(OPERAND), w) + (tl.dot(middle.to(OPERAND), w) + tl.dot(low.to(OPERAND), w))
    elif x.dtype == OPERAND:
        product = tl.dot(x, w)
    else:
        product = tl.dot(widen(x), w)
    return product


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
        sum_ = widen(result) + widen(tl.load(residual + offset, mask=inside, other=0.0))
        result = narrow(sum_, out.dtype.element_ty)
    tl.store(out + offset, result, mask=inside)
