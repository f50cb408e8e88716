"""How far an encoded operand is from what was encoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.format.encoded import Operand, decode

ROWS = 1 << 18
"""Scalars of the rows that are decoded at a time: few enough for caches, many enough that the call costs little."""

LEAST = 1e-25
"""Sum of a row's squares from which on those that fp32 is too small for do not count."""


def sqnr_db(x: Tensor, encoded: Operand, decoded: Callable[[Any], Tensor] = decode) -> float:
    """Signal-to-quantization-noise ratio, `10 log10(sum x^2 / sum (x - decoded)^2)`, in dB.

    Args:
        x: [R, K], what was encoded.
        encoded: the result.
        decoded: what decodes some rows of it.

    Returns:
        dB; infinity where the code is exact, NaN for all-zero or empty x. Works through the rows in chunks.
    """
    return sqnr_db_of_all([(x, encoded)], decoded)


def sqnr_db_of_all(operands: Iterable[tuple[Tensor, Operand]], decoded: Callable[[Any], Tensor] = decode) -> float:
    """The same of several operands together, such as the matrices of a stack."""
    signal = noise = 0.0
    for x, encoded in operands:
        step = max(1, ROWS // max(1, encoded.columns))
        for start in range(0, x.shape[0], step):
            part = x[start : start + step].float()
            signal += _square(part)
            noise += _square(part - decoded(encoded.rows(start, start + step)))
    if signal == 0:
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def _square(x: Tensor) -> float:
    """The sum of squares of [R, K] fp32: a row's in fp32, if that has the range for them, and all rows' in double."""
    rows = torch.linalg.vecdot(x, x)
    if not bool(((rows > LEAST) & rows.isfinite()).all()):
        rows = x.double().square().sum(1)
    return float(rows.sum(dtype=torch.float64))
