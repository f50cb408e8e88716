"""Operands for the kernels' tests, and where they live: on the CPU for the interpreter, else on the GPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec
from tests.format.cases import codebooks_of, int8

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def codebooks(spec: FormatSpec, seed: int = 7) -> Tensor:
    return int8(codebooks_of(seed, spec.num_codebooks)).to(DEVICE)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    one, other = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected))
    assert torch.equal(one, other), f"{int((one != other).sum())} of {one.numel()} bytes differ"


def assert_same_bytes(actual: tuple[Tensor, ...], expected: Encoded) -> None:
    """`actual` is (codes, selectors, scales, tensor_scale [M, 1])."""
    tensor_scale = expected.tensor_scale.expand(expected.shape[0], 1)
    for one, other in zip(actual, (expected.codes, expected.selectors, expected.scales, tensor_scale), strict=True):
        assert_same_bits(one, other)
