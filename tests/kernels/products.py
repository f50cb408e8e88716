"""What a linear's result has to be, from the format alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, decode

PRODUCT_TOLERANCE = 2e-6
"""Of the sum of the products' magnitudes: fp32 rounding of at most a few hundred partial sums (2**-24 each)."""


def assert_product(out: Tensor, a: Tensor, w: Encoded, bias: Tensor | None = None) -> None:
    """`out` is `a @ decode(w).T + bias` to fp32 rounding, and to one rounding more where out is not fp32."""
    out, a64, w64 = out.cpu(), a.cpu().double(), decode(w).double()
    b64 = torch.zeros(()) if bias is None else bias.cpu().double()
    expected = a64 @ w64.T + b64
    tolerance = PRODUCT_TOLERANCE * (a64.abs() @ w64.abs().T + b64.abs())
    if out.dtype != torch.float32:
        tolerance += torch.finfo(out.dtype).eps * expected.abs() + torch.finfo(out.dtype).tiny
    excess = (out.double() - expected).abs() - tolerance
    assert bool((excess <= 0).all()), f"off by {excess.max().item():.3g} at {int(excess.argmax())} of {list(out.shape)}"
