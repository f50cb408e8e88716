"""How far an encoded operand is from what was encoded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.format.encoded import Operand, decode

ROWS = 1 << 18
"""Scalars of the rows that are decoded at a time: few enough for caches, many enough that the call costs little."""


def sqnr_db(x: Tensor, encoded: Operand) -> float:
    """Signal-to-quantization-noise ratio, `10 log10(sum x^2 / sum (x - decoded)^2)`, in dB.

    Args:
        x: [R, K], what was encoded.
        encoded: the result.

    Returns:
        dB; infinity where the code is exact, NaN for all-zero or empty x. Works through the rows in chunks.
    """
    return sqnr_db_of(row_squares(x, encoded))


def row_squares(x: Tensor, encoded: Operand, decoded: Callable[[Any], Tensor] = decode) -> Tensor:
    """Of each row the sum of its squares, and that of its distances from what `encoded` decodes to.

    Args:
        x: [R, K], what was encoded.
        encoded: the result.
        decoded: what decodes some rows of it.

    Returns:
        fp64 [R, 2]. Distances are rounded to fp32; their squares, and their sums, are doubles.
    """
    step = max(1, ROWS // max(1, encoded.columns))
    sums = torch.empty((x.shape[0], 2), dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[0], step):
        part = x[start : start + step].float()
        errors = part - decoded(encoded.rows(start, start + step))
        for place, values in enumerate((part, errors)):
            sums[start : start + step, place] = values.double().square().sum(1)
    return sums


def sqnr_db_of(squares: Tensor) -> float:
    """The ratio of all rows together; squares: fp64 [R, 2], of `row_squares`. It does not depend on their order."""
    signal, noise = (math.fsum(column) for column in squares.t().tolist())
    if signal == 0:
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
