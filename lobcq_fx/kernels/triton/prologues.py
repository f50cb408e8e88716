"""What an encoder computes on its way: norms and gated activations, bit for bit by the rules of `ops/prologues.py`, and
the rotation of block arrays by that of `format/rotation.py`.

Nothing lies in memory between a prologue and the encoding. A row is read once for each mean, once for its absmax and
once to be encoded, all but the first time from cache, and the prologue is computed anew for the last two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.kernels.triton.floats import narrow, widen

NONE = tl.constexpr("none")
RMS_NORM = tl.constexpr("rms_norm")
ADD_RMS_NORM = tl.constexpr("add_rms_norm")
LAYER_NORM = tl.constexpr("layer_norm")
SILU_MUL = tl.constexpr("silu_mul")


@dataclass(frozen=True)
class RmsNorm:
    """`rms_norm(x, weight, eps, offset, round_first)`. weight: fp32, bf16 or fp16 [K], or None."""

    weight: Tensor | None
    eps: float
    offset: float = 0.0
    round_first: bool = True


@dataclass(frozen=True)
class AddRmsNorm:
    """`norm` of `residual + x`, which is rounded to x's dtype and written to `sums`.

    residual: [M, K] in x's dtype, its last dimension contiguous. sums: the same, contiguous.
    """

    residual: Tensor
    sums: Tensor
    norm: RmsNorm


@dataclass(frozen=True)
class LayerNorm:
    """`layer_norm(x, weight, bias, eps)`. weight, bias: fp32, bf16 or fp16 [K], or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class SiluMul:
    """`silu_mul(x, up)`. up: [M, K] in x's dtype, its last dimension contiguous."""

    up: Tensor


Prologue = RmsNorm | AddRmsNorm | LayerNorm | SiluMul


class Operands(NamedTuple):
    """A prologue as kernels take it, in one argument. What is None, and the constants, are compiled in.

    rotation: how many columns are rotated together once the rest is done; 0 for none.
    second: `up` or `residual`, [M, K], rows `second_stride` apart.
    """

    kind: tl.constexpr
    rotation: tl.constexpr
    second: Tensor | None = None
    second_stride: int | None = None
    sums: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = None
    offset: float | None = None
    round_first: tl.constexpr | None = None


def operands(prologue: Prologue | None, rotation: int = 0) -> Operands:
    """What `prologue`, and then a rotation of each `rotation` columns, is in a launch."""
    rotated = tl.constexpr(rotation)
    match prologue:
        case None:
            return Operands(NONE, rotated)
        case SiluMul(up):
            return Operands(SILU_MUL, rotated, up, up.stride(0))
        case LayerNorm(weight, bias, eps):
            return Operands(LAYER_NORM, rotated, weight=_contiguous(weight), bias=_contiguous(bias), eps=eps)
        case AddRmsNorm(residual, sums, norm):
            added = operands(norm, rotation)
            return added._replace(kind=ADD_RMS_NORM, second=residual, second_stride=residual.stride(0), sums=sums)
        case RmsNorm(weight, eps, offset, round_first):
            constant = tl.constexpr(round_first)
            weight = _contiguous(weight)
            return Operands(RMS_NORM, rotated, weight=weight, eps=eps, offset=offset, round_first=constant)


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


@triton.jit
def rounded(numbers, like):
    """fp32 -> fp32, rounded to the dtype that `like` points to."""
    return widen(narrow(numbers, like.dtype.element_ty))


@triton.jit
def parameter(pointer, column, inside):
    """Elements of a weight or bias [K] -> fp32."""
    return widen(tl.load(pointer + column, mask=inside, other=0.0))


@triton.jit
def second_numbers(row, column, inside, prologue):
    """Elements of `up` or `residual` -> fp32."""
    return widen(tl.load(prologue.second + row * prologue.second_stride + column, mask=inside, other=0.0))


@triton.jit
def source_numbers(x, row, column, inside, prologue):
    """What the prologue is a function of: x, or its sum with the residual. x: pointer to the row. -> fp32."""
    numbers = widen(tl.load(x + column, mask=inside, other=0.0))
    if prologue.kind == ADD_RMS_NORM:
        numbers = rounded(second_numbers(row, column, inside, prologue) + numbers, x)
    return numbers


@triton.jit
def row_mean(x, row, columns, prologue, center, SQUARED: tl.constexpr, TILE: tl.constexpr):
    """The mean of a row less `center`, squared or not, in fp64: there the order of the sum does not show."""
    offset = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float64)
    for start in range(0, columns, TILE):
        inside = start + offset < columns
        numbers = source_numbers(x, row, start + offset, inside, prologue).to(tl.float64) - center
        total += tl.where(inside, numbers * numbers if SQUARED else numbers, 0.0)
    return tl.sum(total, axis=0) / columns


@triton.jit
def row_statistics(x, row, columns, prologue, TILE: tl.constexpr):
    """What a norm subtracts from a row, and what it multiplies it with, fp32; zeros where there is no norm."""
    mean = 0.0
    factor = 0.0
    if prologue.eps is not None:
        center = 0.0
        if prologue.kind == LAYER_NORM:
            center = row_mean(x, row, columns, prologue, 0.0, False, TILE)
            mean = center.to(tl.float32)
        mean_square = row_mean(x, row, columns, prologue, center, True, TILE).to(tl.float32)
        factor = tl.div_rn(1.0, tl.sqrt_rn(mean_square + prologue.eps))
    return mean, factor


@triton.jit
def prologue_result(numbers, x, row, column, inside, statistics, prologue):
    """`source_numbers` -> what is encoded, fp32, of x's dtype where it is not rotated; zeros outside the row."""
    mean, factor = statistics
    if prologue.kind == SILU_MUL:
        silu = rounded(tl.div_rn(numbers, 1.0 + tl.exp(-numbers)), x)
        numbers = silu * second_numbers(row, column, inside, prologue)
    elif prologue.kind == LAYER_NORM:
        numbers = (numbers - mean) * factor
        if prologue.weight is not None:
            numbers *= parameter(prologue.weight, column, inside)
        if prologue.bias is not None:
            numbers += parameter(prologue.bias, column, inside)
    elif prologue.kind != NONE:
        numbers *= factor
        if prologue.weight is not None:
            if prologue.round_first:
                numbers = rounded(numbers, x)
            numbers *= parameter(prologue.weight, column, inside) + prologue.offset
    if prologue.kind != NONE:
        numbers = tl.where(inside, rounded(numbers, x), 0.0)
    if prologue.rotation > 0:
        numbers = rotate(numbers, prologue.rotation)
    return numbers


@triton.jit
def rotate(numbers, ARRAY: tl.constexpr):
    """A tile of whole block arrays, of any shape -> the same rotated: `lobcq_fx.format.rotate`, stage by stage."""
    ARRAYS: tl.constexpr = numbers.numel // ARRAY
    LEVELS: tl.constexpr = 4 if ARRAY == 16 else 5 if ARRAY == 32 else 6 if ARRAY == 64 else 7
    arrays = tl.reshape(numbers, (ARRAYS, ARRAY))
    for _ in tl.static_range(LEVELS // 2):
        arrays = two_stages(arrays)
    if LEVELS % 2 == 1:
        first, second = tl.split(tl.reshape(arrays, (ARRAYS, ARRAY // 2, 2)))
        pairs = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
        arrays = tl.reshape(pairs, (ARRAYS, ARRAY))
    return tl.reshape(arrays * (0.5 ** (LEVELS // 2)), numbers.shape)


@triton.jit
def two_stages(arrays):
    """[A, L_A] -> two stages on, the two lowest bits of places now the highest: threads exchange once for both."""
    ARRAYS: tl.constexpr = arrays.shape[0]
    QUADS: tl.constexpr = arrays.shape[1] // 4
    first, second = tl.split(tl.reshape(arrays, (ARRAYS, QUADS, 2, 2)))
    sum_first, sum_second = tl.split(first + second)
    difference_first, difference_second = tl.split(first - second)
    sums = tl.join(sum_first + sum_second, sum_first - sum_second)
    differences = tl.join(difference_first + difference_second, difference_first - difference_second)
    return tl.reshape(tl.permute(tl.join(sums, differences), (0, 2, 3, 1)), (ARRAYS, 4 * QUADS))


@triton.jit
def tile_to_encode(x, row, columns, column, inside, statistics, prologue):
    """A tile of row `row`, by its own program alone: the sum with the residual is stored here. -> fp32."""
    numbers = source_numbers(x, row, column, inside, prologue)
    if prologue.sums is not None:
        place = row * columns + column
        tl.store(prologue.sums + place, narrow(numbers, x.dtype.element_ty), mask=inside)
    return prologue_result(numbers, x, row, column, inside, statistics, prologue)
