"""Sums of table values over blocks: the inner loop of everything that assigns blocks to codebooks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lobcq_fx.format.spec import BLOCK_SIZE

FLOAT32_INTEGERS = 1 << 24
"""fp32 adds integers up to here exactly."""

COLUMNS = 16
"""Columns summed at a time: a table this wide stays in the cache."""


def block_sums(index: Tensor, table: Tensor) -> Tensor:
    """Add up the rows of a table that each block names.

    torch sums bags of fp32 rows some fifteen times faster than fp64 rows. So the table is cut in two fp32 tables: high
    parts that are multiples of a power of two coarse enough for every sum to be exact, and the small rests.

    Args:
        index: int [n, 8], rows of the table.
        table: fp64 [rows, C], not negative.

    Returns:
        fp64 [n, C], with an error below 2**-43 of the largest sum possible; exact for sums of integers below 2**26.
    """
    if table.shape[1] > COLUMNS:
        return torch.cat([block_sums(index, part) for part in torch.split(table, COLUMNS, dim=1)], dim=1)
    largest = float(table.max()) * BLOCK_SIZE
    unit = 2.0 ** (math.frexp(largest)[1] - math.frexp(FLOAT32_INTEGERS)[1] + 2) if largest > 0 else 1.0
    high = (table / unit).round() * unit
    return _float_sums(index, high) + _float_sums(index, table - high)


def _float_sums(index: Tensor, table: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(index, table.float().contiguous(), mode="sum").double()
