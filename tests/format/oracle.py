"""The number format a second time, one scalar at a time, from its written rules: no torch, nothing of the package.

Slow and plain on purpose. fp32 arithmetic is numpy's float32 scalars (IEEE, nearest even); E4M3 is a list of its 127
finite values; everything after the grid is Python integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

F32 = np.float32

BLOCK = 8


def e4m3_value(byte: int) -> float:
    """Sign, 4 bits of exponent with bias 7, 3 bits of mantissa; exponent 0 is subnormal; no infinities."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 0xF, byte & 0x7
    if byte & 0x7F == 0x7F:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = [e4m3_value(byte) for byte in range(0x7F)]
"""The 127 finite values that are not negative, in order: byte 0 is 0, byte 0x7E is 448."""


def e4m3_byte(value: float) -> int:
    """Nearest of the 127 values, a tie to the even byte, saturating at 448."""
    if value >= E4M3[-1]:
        return len(E4M3) - 1
    above = next(byte for byte, candidate in enumerate(E4M3) if candidate > value)
    below = above - 1
    down, up = value - E4M3[below], E4M3[above] - value  # exact: both are multiples of 2**-149 below 2**9 in doubles
    if down == up:
        return below if below % 2 == 0 else above
    return below if down < up else above


@dataclass
class Packed:
    """codes, selectors, scales: a list of bytes for each row; tensor_scales: one fp32 for each row."""

    codes: list[list[int]]
    selectors: list[list[int]]
    scales: list[list[int]]
    tensor_scales: list[np.float32]
    decoded: np.ndarray


def absmax(values) -> np.float32:
    return max((abs(F32(v)) for v in values), default=F32(0))


def tensor_scale_of(values, divisor=13888) -> np.float32:
    largest = absmax(values)
    return F32(1) if largest == 0 else largest / F32(divisor)


def array_scale_byte(array, t: np.float32) -> int:
    largest = absmax(array)
    if largest == 0:
        return 0
    unit = largest / F32(31)
    ratio = F32(0) if unit == 0 and t == 0 else unit / t  # 0 / 0: far below any scale, hence the smallest one
    return max(1, e4m3_byte(float(ratio)))  # byte 1 is 2**-9


def grid_value(x: np.float32, scale_byte: int, t: np.float32) -> int:
    divisor = F32(E4M3[scale_byte]) * t
    if divisor == 0:
        return 0
    sixteenths = np.rint(F32(16) * (x / divisor))
    return int(min(max(sixteenths, F32(-2047)), F32(2047)))


def nearest_entry(q: int, codebook: list[int]) -> int:
    """min() keeps the first of equals: a tie goes to the lower index."""
    return min(range(16), key=lambda j: abs(q - 16 * codebook[j]))


def encode_block(q: list[int], codebooks: list[list[int]]) -> tuple[int, list[int]]:
    codes = [[nearest_entry(v, codebook) for v in q] for codebook in codebooks]
    errors = [
        sum((v - 16 * codebook[j]) ** 2 for v, j in zip(q, chosen, strict=True))
        for codebook, chosen in zip(codebooks, codes, strict=True)
    ]
    best = errors.index(min(errors))  # the first of equals
    return best, codes[best]


def selector_width(num_codebooks: int) -> int:
    return {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}[num_codebooks]


def encode_array(array, scale: int, codebooks: list[list[int]], t: np.float32):
    """(codes, selectors, cost) under a scale; the cost is exact, in squares of a sixteenth of t."""
    codes: list[int] = []
    selectors: list[int] = []
    error = 0
    q = [grid_value(v, scale, t) for v in array]
    for first in range(0, len(array), BLOCK):
        block = q[first : first + BLOCK]
        selector, block_codes = encode_block(block, codebooks)
        selectors.append(selector)
        codes += block_codes
        error += sum((v - 16 * codebooks[selector][j]) ** 2 for v, j in zip(block, block_codes, strict=True))
    return codes, selectors, error * Fraction(E4M3[scale]) ** 2


def scales_to_try(first: int, search: bool) -> list[int]:
    if first == 0 or not search:
        return [first]
    return [min(max(first + step, 1), len(E4M3) - 1) for step in (0, -1, 1)]


def encode_row(row, array_size: int, codebooks: list[list[int]], t: np.float32, search: bool = False):
    """(codes, selectors, scale bytes), unpacked, of one row."""
    scalars = [F32(v) for v in row]
    scalars += [F32(0)] * (-len(scalars) % array_size)
    codes: list[int] = []
    selectors: list[int] = []
    scales: list[int] = []
    for start in range(0, len(scalars), array_size):
        array = scalars[start : start + array_size]
        tried = scales_to_try(array_scale_byte(array, t), search)
        results = [encode_array(array, scale, codebooks, t) for scale in tried]
        best = min(range(len(tried)), key=lambda i: results[i][2])  # the first of equals
        scales.append(tried[best])
        codes += results[best][0]
        selectors += results[best][1]
    return codes, selectors, scales


def pack_nibbles(codes: list[int]) -> list[int]:
    return [codes[i] + 16 * codes[i + 1] for i in range(0, len(codes), 2)]


def pack_bits(values: list[int], width: int) -> list[int]:
    """One long little-endian number, cut into bytes."""
    number = sum(value << (width * i) for i, value in enumerate(values))
    return list(number.to_bytes((width * len(values) + 7) // 8, "little"))


def encode(x, array_size: int, codebooks: list[list[int]], tensor_scales=None, search: bool = False) -> Packed:
    """x: float32 [R, K]. tensor_scales: None (the weight rule), or one fp32 a row."""
    with np.errstate(all="ignore"):
        if tensor_scales is None:
            tensor_scales = [tensor_scale_of(np.asarray(x).ravel())] * len(x)
        out = Packed([], [], [], [F32(t) for t in tensor_scales], np.zeros(np.shape(x), F32))
        width = selector_width(len(codebooks))
        for r, row in enumerate(x):
            t = out.tensor_scales[r]
            codes, selectors, scales = encode_row(row, array_size, codebooks, t, search)
            out.codes.append(pack_nibbles(codes))
            out.selectors.append(pack_bits(selectors, width))
            out.scales.append(scales)
            for i in range(len(row)):
                entry = F32(codebooks[selectors[i // BLOCK]][codes[i]])
                out.decoded[r, i] = (entry * F32(E4M3[scales[i // array_size]])) * t
    return out


def int8_scale_byte(array, t: np.float32) -> int:
    """The least of the 127 values that is not below the ratio, saturating at 448."""
    largest = absmax(array)
    if largest == 0:
        return 0
    unit = largest / F32(127)
    ratio = 0.0 if unit == 0 and t == 0 else float(unit / t)
    return next((byte for byte, value in enumerate(E4M3) if byte and value >= ratio), len(E4M3) - 1)


def int8_entry(x: np.float32, scale_byte: int, t: np.float32) -> int:
    divisor = F32(E4M3[scale_byte]) * t
    if divisor == 0:
        return 0
    return int(min(max(np.rint(x / divisor), F32(-127)), F32(127)))


def int8_row(row, array_size: int, t: np.float32) -> tuple[list[int], list[int]]:
    """(entries, scale bytes) of one row."""
    scalars = [F32(v) for v in row]
    scalars += [F32(0)] * (-len(scalars) % array_size)
    arrays = [scalars[start : start + array_size] for start in range(0, len(scalars), array_size)]
    with np.errstate(all="ignore"):
        scales = [int8_scale_byte(array, t) for array in arrays]
        return [int8_entry(v, s, t) for array, s in zip(arrays, scales, strict=True) for v in array], scales


def integer_dot_products(a, w, array_size: int, codebooks_a, codebooks_w, t_a, t_w) -> float:
    """One element of the product of row a and row w as hardware sees it, in doubles: the rules' sum over arrays."""
    codes_a, selectors_a, scales_a = encode_row(a, array_size, codebooks_a, t_a)
    codes_w, selectors_w, scales_w = encode_row(w, array_size, codebooks_w, t_w)
    total = 0.0
    for g in range(len(scales_a)):
        inside = range(g * array_size, min((g + 1) * array_size, len(a)))  # a padded position contributes nothing
        dot = sum(
            codebooks_a[selectors_a[i // BLOCK]][codes_a[i]] * codebooks_w[selectors_w[i // BLOCK]][codes_w[i]]
            for i in inside
        )
        assert abs(dot) < 2**17
        total += E4M3[scales_a[g]] * E4M3[scales_w[g]] * dot
    return float(t_a) * float(t_w) * total
