"""Rotation, bit for bit, against a second implementation: one scalar at a time, in the order of docs/format.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lobcq_fx.format import rotate
from tests.format.cases import KINDS, matrix

SIZES = (16, 32, 64, 128)
FACTORS = {16: 2.0**-2, 32: 2.0**-2, 64: 2.0**-3, 128: 2.0**-3}


def rotated_by_scalars(row: np.ndarray, size: int) -> np.ndarray:
    x = row.copy()
    distance = 1
    while distance < size:
        for i in range(len(x)):
            if not i & distance:
                x[i], x[i + distance] = x[i] + x[i + distance], x[i] - x[i + distance]
        distance *= 2
    return x * np.float32(FACTORS[size])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit(kind: str, size: int) -> None:
    x = matrix(kind, 2, 256, seed=size)
    with np.errstate(all="ignore"):
        expected = np.stack([rotated_by_scalars(row, size) for row in x])
    actual = rotate(torch.from_numpy(x), size)
    assert torch.equal(actual.view(torch.int32), torch.from_numpy(expected).view(torch.int32))


@pytest.mark.parametrize("size", SIZES)
def test_that_of_weights_undoes_it(size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        identity = torch.eye(size, dtype=dtype)
        assert torch.equal(rotate(rotate(identity, size), size, "weight"), identity)
        assert torch.equal(rotate(identity, size), rotate(identity, size).t())
    x, w = torch.randn(5, 256, dtype=torch.float64), torch.randn(7, 256, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, size) @ rotate(w, size, "weight").T, x @ w.T)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 3, 128), (64,)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    actual = rotate(x, 64)
    assert actual.shape == x.shape
    assert actual.is_contiguous()
    for row, expected in zip(actual.reshape(-1, shape[-1] or 1), x.reshape(-1, shape[-1] or 1), strict=True):
        assert torch.equal(row, rotate(expected, 64))


def test_what_is_not_finite_spoils_its_array_alone() -> None:
    x = torch.ones(1, 128)
    x[0, 3] = float("inf")
    assert rotate(x, 64).isfinite().tolist() == [[False] * 64 + [True] * 64]
