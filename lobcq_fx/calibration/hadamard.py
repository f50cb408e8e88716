"""Rotation of the columns within each block array, by Hadamard matrices.

For an invertible matrix A that mixes the columns of an array, `x @ w.T == (x A) @ (w inverse(A).T).T`. A Hadamard
matrix has entries of one magnitude: a column that stands out is spread over its whole array, which then has a smaller
scale (QuaRot, Ashkboos et al., NeurIPS 2024, arXiv 2404.00456; here within arrays).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Operand = Literal["activation", "weight"]


def hadamard(size: int, operand: Operand) -> Tensor:
    """The matrix that an operand's arrays are multiplied with, fp32 [size, size] on the CPU, symmetric.

    Its entries are plus and minus one power of two, so that every float dtype has them. The two operands' matrices are
    each other's inverses; where `size` is no power of four, neither is orthogonal by itself.

    Args:
        size: a power of two.
        operand: whose arrays.
    """
    signs = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(signs) < size:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    levels = size.bit_length() - 1
    exponent = round(levels / 2) if operand == "activation" else levels - round(levels / 2)
    return signs / float(1 << exponent)


def rotated(x: Tensor, size: int, operand: Operand) -> Tensor:
    """x [..., K] with each `size` columns rotated, in its dtype; K is a multiple of `size`."""
    matrix = hadamard(size, operand).to(x)
    arrays: Tensor = x.unflatten(-1, (-1, size)) @ matrix
    return arrays.flatten(-2)
