"""How far an encoded operand is from what was encoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from lobcq_fx.format.codes import CHUNK
from lobcq_fx.format.encoded import Operand, decode


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
        step = max(1, CHUNK // max(1, encoded.columns))
        for start in range(0, x.shape[0], step):
            part = x[start : start + step].double()
            signal += float(part.square().sum())
            noise += float((part - decoded(encoded.rows(start, start + step))).square().sum())
    if signal == 0:
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
