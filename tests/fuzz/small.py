"""Two small quantized models of one shape, for what saves and loads them many times."""

from __future__ import annotations

import torch
from torch import nn

import lobcq_fx

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def quantized(seed: int = 0) -> lobcq_fx.QuantizedModel:
    """Three linears and a norm."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    return lobcq_fx.quantize(model, example_inputs=X)
