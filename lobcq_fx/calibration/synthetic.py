"""Seeded synthetic operands: the distributions the universal codebooks are fitted to and the format is measured on."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Source = Literal["gaussian", "laplace", "student-t4"]
SOURCES: tuple[Source, ...] = get_args(Source)
"""Light, medium and heavy tails: what weights and activations of transformers look like within a tensor."""

_DEGREES_OF_FREEDOM = 4


def synthetic(source: Source, shape: tuple[int, ...], seed: int) -> Tensor:
    """Independent draws, fp32 of the given shape.

    Raises:
        ValueError: an unknown source.
    """
    generator = torch.Generator().manual_seed(seed)
    if source == "gaussian":
        return torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator)
    if source == "laplace":
        exponential = torch.empty((2, *shape), dtype=torch.float32, device="cpu").exponential_(generator=generator)
        return exponential[0] - exponential[1]
    if source == "student-t4":
        shape = (1 + _DEGREES_OF_FREEDOM, *shape)
        normal = torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator)
        return normal[0] / normal[1:].square().mean(dim=0).sqrt()
    raise ValueError(f"source {source!r}: use one of {SOURCES}")
