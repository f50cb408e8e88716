"""Inputs that the format's tests share: codebooks, matrices of many kinds, and the comparison with the oracle."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings

from lobcq_fx.format import Encoded, FormatSpec, decode, encode
from tests.format import oracle
from tests.sweeps import sweep

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
"""The same examples every run: a failure is a change of the code, and nothing is written to disk."""

ALL_SPECS = [FormatSpec(n, a) for n in (1, 2, 4, 8, 16) for a in (16, 32, 64, 128)]

EVERY_SPEC = sweep(ALL_SPECS, [FormatSpec.from_name(name) for name in ("1x16", "2x32", "4x64", "8x64", "16x128")])
"""For parametrizations: all of them at night, by day each number of codebooks and each size of array once."""


def codebooks_of(seed: int, num_codebooks: int) -> list[list[int]]:
    """Sorted random codebooks: wide and narrow ones, repeated entries, some without a zero."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(num_codebooks):
        reach = (31, 31, 12, 20)[k % 4]
        row = sorted(rng.integers(-reach, reach + 1, size=16).tolist())
        rows.append([entry or 1 for entry in row] if k % 2 else row)
    return [sorted(row) for row in rows]


def int8(codebooks: list[list[int]]) -> torch.Tensor:
    return torch.tensor(codebooks, dtype=torch.int8)


KINDS = ("normal", "heavy", "uniform", "ties", "sparse", "mixed magnitudes", "subnormal", "huge", "constant")


def matrix(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """float32 [rows, columns], finite."""
    rng = np.random.default_rng(seed)
    shape = (rows, columns)
    normal = rng.standard_normal(shape)
    if kind == "normal":
        values = normal
    elif kind == "heavy":
        values = rng.standard_t(2, shape)
    elif kind == "uniform":
        values = rng.uniform(-1, 1, shape)
    elif kind == "ties":
        # With the first scalar of an array at 31 and t = 1 the array's scale is 1, and halves of grid steps are ties
        # of the rounding, halves of units ties between entries.
        values = rng.integers(-31 * 32, 31 * 32 + 1, shape) / 32
        values[:, ::16] = 31
    elif kind == "sparse":
        values = normal * (rng.random(shape) < 0.05)
    elif kind == "mixed magnitudes":
        values = normal * 10.0 ** rng.uniform(-38, 37, shape)
    elif kind == "subnormal":
        values = rng.integers(-40, 41, shape) * 2.0**-149
    elif kind == "huge":
        values = rng.uniform(-3.4e38, 3.4e38, shape)
    else:
        values = np.full(shape, rng.choice([1.0, -1.0, 1e-38, 1e38, 0.0, 3.4028234e38]))
    return values.astype(np.float32)


def same_bytes(
    x: torch.Tensor, spec: FormatSpec, codebooks: list[list[int]], tensor_scale=None, search=False
) -> Encoded:
    """Encode with the package and with the oracle, compare every byte and every decoded bit."""
    encoded = encode(x, spec, int8(codebooks), tensor_scale, search_scales=search)
    per_row = None if tensor_scale is None else tensor_scale.reshape(-1).tolist()
    if per_row is not None and len(per_row) == 1:
        per_row *= x.shape[0]
    expected = oracle.encode(x.float().numpy(), spec.array_size, codebooks, per_row, search)
    assert encoded.codes.tolist() == expected.codes
    assert encoded.selectors.tolist() == expected.selectors
    assert encoded.scales.view(torch.uint8).tolist() == expected.scales
    scales = encoded.tensor_scale.expand(x.shape[0], 1).numpy()
    assert bits(scales) == bits(np.array(expected.tensor_scales, np.float32).reshape(-1, 1))
    assert bits(decode(encoded).numpy()) == bits(expected.decoded)
    return encoded


def bits(values: np.ndarray) -> list[list[int]]:
    """The fp32 bit patterns, so that -0 is not 0 and a difference in the last place shows."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32).tolist()
