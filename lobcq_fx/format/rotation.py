"""Rotation of the columns within each block array, by Hadamard matrices: docs/format.md, "Rotation".

For an invertible matrix A that mixes the columns of an array, `x @ w.T == (x A) @ (w inverse(A).T).T`. A Hadamard
matrix has entries of one magnitude: a column that stands out is spread over its whole array, which then has a smaller
scale (QuaRot, Ashkboos et al., NeurIPS 2024, arXiv 2404.00456; here within arrays).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RotatedOperand = Literal["activation", "weight"]


def rotate(x: Tensor, array_size: int, operand: RotatedOperand = "activation") -> Tensor:
    """Rotate each `array_size` columns: a fast Walsh-Hadamard transform, then a multiplication with a power of two.

    The two operands' transforms are each other's inverses; where `array_size` is no power of four, they are multiplied
    with different powers of two.

    Args:
        x: [..., K], K a multiple of `array_size`, in the dtype in which every stage rounds.
        array_size: a power of two.
        operand: whose columns.

    Returns:
        [..., K] in x's dtype, contiguous.
    """
    levels = array_size.bit_length() - 1
    exponent = levels // 2 if operand == "activation" else levels - levels // 2
    arrays = x.reshape(*x.shape[:-1], x.shape[-1] // array_size, array_size)
    for _ in range(levels):
        # Neighbours are combined, and the lowest bit of their places becomes the highest: stage s combines what was
        # 2^s apart, and after the last one every number is in its own place again.
        first, second = arrays[..., 0::2], arrays[..., 1::2]
        arrays = torch.cat((first + second, first - second), dim=-1)
    return (arrays * 2.0**-exponent).flatten(-2)
