"""The body of `QuantizeActivation`: docs/format.md, "Encoding", in standard ONNX ops, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lobcq_fx.export.functions.body import E4M3, FLOAT, INT32, INT64, Body
from lobcq_fx.export.functions.packing import (
    last_size,
    leading_shape,
    pack_codes,
    pack_selectors,
    reshape_last,
    selector_bits,
)
from lobcq_fx.export.functions.scaling import at_least_smallest, marked, scale_ratio, scaled_rows
from lobcq_fx.format.spec import BLOCK_SIZE, ENTRY_MAX, GRID, GRID_MAX

BUCKET = GRID // 2
"""Grid steps between two midpoints of entries: within (8(m - 1), 8m] the nearest entry is the same (step 4)."""

LAST_BUCKET = 2 * ENTRY_MAX
FIRST_BUCKET = -LAST_BUCKET - 1
BUCKETS = LAST_BUCKET - FIRST_BUCKET + 1


def build(op: Body, x: ir.Value, codebooks: ir.Value, static_scale: ir.Value) -> Sequence[ir.Value]:
    """codes, selectors, scales and tensor_scale of x, encoded along its last dimension."""
    rows = scaled_rows(op, x, static_scale, ENTRY_MAX)
    ratio = scale_ratio(op, rows.absmax, rows.tensor_scale, ENTRY_MAX)
    scales = at_least_smallest(op, op("Cast", op("Cast", ratio, to=E4M3), to=FLOAT), rows.absmax)
    grid = _to_grid(op, rows.arrays, op("Mul", scales, rows.tensor_scale))
    codes, selectors = _assign_codes(op, grid, codebooks)
    packed_selectors = pack_selectors(op, selectors, selector_bits(op, codebooks))
    return (pack_codes(op, codes), packed_selectors, *marked(op, rows, scales))


def _to_grid(op: Body, arrays: ir.Value, divisor: ir.Value) -> ir.Value:
    """Step 3, an integer in fp32 [..., Kp / 8, 8]."""
    normalised = op("Where", op("Equal", divisor, 0.0), 0.0, op("Div", arrays, divisor))
    grid = op("Clip", op("Round", op("Mul", normalised, float(GRID))), float(-GRID_MAX), float(GRID_MAX))
    size = op("Shape", grid, start=-2)
    blocks = op("Div", op("ReduceProd", size, keepdims=1), [BLOCK_SIZE])
    return reshape_last(op, grid, op("Shape", grid, end=-2), blocks, BLOCK_SIZE)


@dataclass(frozen=True)
class _Tables:
    """Look-up tables by bucket: the nearest entry's index int32 [126, N_c], and its value fp32 [126, N_c]."""

    nearest: ir.Value
    entries: ir.Value


def _tables(op: Body, codebooks: ir.Value) -> _Tables:
    """Step 4 for the highest grid value of each bucket. ArgMin takes the first of equal minima."""
    highest = BUCKET * (np.arange(FIRST_BUCKET, LAST_BUCKET + 1, dtype=np.float32) + 1)
    entries = op("Cast", codebooks, to=FLOAT)
    scaled = op("Unsqueeze", op("Mul", entries, float(GRID)), [1])
    nearest = op("ArgMin", op("Abs", op("Sub", highest[:, None], scaled)), axis=-1, keepdims=0)
    chosen = op("GatherElements", entries, nearest, axis=1)
    return _Tables(op("Transpose", op("Cast", nearest, to=INT32), perm=[1, 0]), op("Transpose", chosen, perm=[1, 0]))


def _assign_codes(op: Body, grid: ir.Value, codebooks: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Steps 4 and 5: codes int32 [..., Kp] and selectors int32 [..., Kp / 8]. All sums are exact in fp32."""
    tables = _tables(op, codebooks)
    bucket = op("Floor", op("Div", op("Sub", grid, 1.0), float(BUCKET)))
    bucket = op("Clip", bucket, float(FIRST_BUCKET), float(LAST_BUCKET))
    bucket = op("Cast", op("Sub", bucket, float(FIRST_BUCKET)), to=INT64)
    entry = op("Gather", tables.entries, bucket)  # [..., Kp / 8, 8, N_c]
    cost = op("Mul", entry, op("Sub", op("Mul", entry, float(BUCKET)), op("Unsqueeze", grid, [-1])))
    selectors = op("ArgMin", op("ReduceSum", cost, [-2], keepdims=0), axis=-1, keepdims=0)
    num_codebooks = op("Shape", codebooks, start=0, end=1)
    index = op("Add", op("Mul", bucket, num_codebooks), op("Unsqueeze", selectors, [-1]))
    codes = op("Gather", op("Reshape", tables.nearest, [-1]), index)
    leading = leading_shape(op, selectors)
    return (
        reshape_last(op, codes, leading, op("Mul", last_size(op, selectors), [BLOCK_SIZE])),
        op("Cast", selectors, to=INT32),
    )
