"""Codes and selectors packed as they are stored (`lobcq_fx.format.packing`), in standard ONNX ops.

All of these keep any leading dimensions. Shapes are computed, and a 0 in them is a size (`allowzero`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lobcq_fx.export.functions.body import FLOAT, INT32, INT64, UINT8, Body, Operand
from lobcq_fx.format.packing import BITS_PER_BYTE
from lobcq_fx.format.spec import ALLOWED_NUM_CODEBOOKS, BLOCK_SIZE, CODE_BITS, CODEBOOK_SIZE

PAIR = 2
"""Codes in a byte."""

BYTE_VALUES = 1 << BITS_PER_BYTE
BYTE_WEIGHTS = np.array([1 << bit for bit in range(BITS_PER_BYTE)], np.int32)


def leading_shape(op: Body, x: ir.Value) -> ir.Value:
    """All dimensions but the last, int64."""
    return op("Shape", x, end=-1)


def last_size(op: Body, x: ir.Value) -> ir.Value:
    """The last dimension, int64 [1]."""
    return op("Shape", x, start=-1)


def reshape_last(op: Body, x: ir.Value, leading: ir.Value, *sizes: ir.Value | int) -> ir.Value:
    """Replace x's last dimensions by `sizes`, keeping those in `leading`."""
    tail = [op("Constant", value_ints=[size]) if isinstance(size, int) else size for size in sizes]
    return op("Reshape", x, op("Concat", leading, *tail, axis=0), allowzero=1)


def selector_bits(op: Body, codebooks: ir.Value) -> ir.Value:
    """log2(N_c), int64 [1]: how many of the allowed N_c are smaller."""
    num_codebooks = op("Shape", codebooks, start=0, end=1)
    smaller = op("Greater", num_codebooks, list(ALLOWED_NUM_CODEBOOKS))
    return op("ReduceSum", op("Cast", smaller, to=INT64), keepdims=1)


def pack_codes(op: Body, codes: ir.Value) -> ir.Value:
    """int32 [..., Kp] -> uint8 [..., Kp/2]."""
    pairs = reshape_last(op, codes, leading_shape(op, codes), op("Div", last_size(op, codes), [PAIR]), PAIR)
    weights = np.array([1, 1 << CODE_BITS], np.int32)
    return op("Cast", op("ReduceSum", op("Mul", pairs, weights), [-1], keepdims=0), to=UINT8)


def pack_selectors(op: Body, selectors: ir.Value, bits: ir.Value) -> ir.Value:
    """int32 [..., B] of `bits` each -> uint8 [..., ceil(B * bits / 8)].

    Selectors of no bits are packed as if they had one, and the bytes dropped: before 1.31, ONNX Runtime gives sums of
    empty tensors another shape.
    """
    leading, blocks, computed = leading_shape(op, selectors), last_size(op, selectors), op("Max", bits, [1])
    stream = _bits(op, selectors, _powers(op, computed))
    length = op("Mul", blocks, computed)
    stream = reshape_last(op, stream, leading, length)
    fill = op("Mod", op("Neg", length), [BITS_PER_BYTE])
    stream = op("Pad", stream, op("Concat", [0], fill, axis=0), None, [-1])
    num_bytes = op("Div", op("Add", length, fill), [BITS_PER_BYTE])
    weighted = op("Mul", reshape_last(op, stream, leading, num_bytes, BITS_PER_BYTE), BYTE_WEIGHTS)
    packed = op("ReduceSum", weighted, [-1], keepdims=0)
    return op("Cast", op("Slice", packed, [0], op("Mul", num_bytes, op("Min", bits, [1])), [-1]), to=UINT8)


def unpack_selectors(op: Body, packed: ir.Value, bits: ir.Value, blocks: ir.Value) -> ir.Value:
    """uint8 [..., bytes] -> int32 [..., blocks]. Selectors of no bits are read as if they had one, from zeros."""
    leading, computed = leading_shape(op, packed), op("Max", bits, [1])
    missing = op("Mul", blocks, op("Sub", computed, bits))  # a byte for each block is more than enough
    filled = op("Pad", op("Cast", packed, to=INT32), op("Concat", [0], missing, axis=0), None, [-1])
    stream = _bits(op, filled, BYTE_WEIGHTS)
    stream = reshape_last(op, stream, leading, op("Mul", last_size(op, filled), [BITS_PER_BYTE]))
    stream = op("Slice", stream, [0], op("Mul", blocks, computed), [-1])
    weighted = op("Mul", reshape_last(op, stream, leading, blocks, computed), _powers(op, computed))
    return op("ReduceSum", weighted, [-1], keepdims=0)


def scaled_entries(
    op: Body, codes: ir.Value, selectors: ir.Value, scales: ir.Value, codebooks: ir.Value, array_size: ir.Value
) -> ir.Value:
    """A packed operand's entries times block-array scales, exact, fp32 [..., Kp] (`lobcq_fx.format.scaled_entries`).

    A byte of codes and its block's selector look up both entries at once, and the scales are applied to int8: what
    ONNX Runtime makes of a constant weight at session creation then takes 9 bytes a scalar, 4 of which stay.
    """
    leading = leading_shape(op, codes)
    blocks = op("Div", last_size(op, codes), [BLOCK_SIZE // PAIR])
    chosen = unpack_selectors(op, selectors, selector_bits(op, codebooks), blocks)
    first = op("Unsqueeze", op("Mul", chosen, np.array(BYTE_VALUES, np.int32)), [-1])
    by_block = reshape_last(op, op("Cast", codes, to=INT32), leading, blocks, BLOCK_SIZE // PAIR)
    entries = op("Gather", _entry_pairs(op, codebooks), op("Add", by_block, first))
    return scaled(op, entries, scales, array_size, leading, op("Mul", last_size(op, codes), [PAIR]))


def scaled(
    op: Body, entries: ir.Value, scales: ir.Value, array_size: ir.Value, leading: ir.Value, width: ir.Value
) -> ir.Value:
    """int8 entries times block-array scales, exact, fp32 [..., width]."""
    arrays = op("Reshape", entries, op("Concat", [-1], array_size, axis=0))
    product = op("DequantizeLinear", arrays, op("Reshape", op("Cast", scales, to=FLOAT), [-1]), axis=0)
    return reshape_last(op, product, leading, width)


def _entry_pairs(op: Body, codebooks: ir.Value) -> ir.Value:
    """int8 [N_c * 256, 2]: the entries that a byte of two codes stands for, in each codebook."""
    byte = np.arange(BYTE_VALUES)
    code_pairs = np.stack([byte % CODEBOOK_SIZE, byte // CODEBOOK_SIZE], axis=-1)
    return op("Reshape", op("Gather", codebooks, code_pairs, axis=1), [-1, PAIR])


def _bits(op: Body, numbers: ir.Value, powers: Operand) -> ir.Value:
    """int32 [...] -> int32 [..., len(powers)], the bits at these powers of two."""
    return op("Mod", op("Div", op("Unsqueeze", numbers, [-1]), powers), np.array(2, np.int32))


def _powers(op: Body, bits: ir.Value) -> ir.Value:
    """int32 [bits]: 1, 2, 4, ..."""
    return op("Slice", BYTE_WEIGHTS, [0], bits, [0])
