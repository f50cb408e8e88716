"""Gradients of packed products with respect to what they read: those of the product with the decoded weight.

An activation that is encoded on the way counts as what it stands for (the straight-through estimator). So adapters can
be trained on a packed base, whose own weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


class StraightThrough(torch.autograd.Function):
    """Calls `product(x)`, and gives x the gradient that `to_input` makes of the result's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Map, to_input: Map) -> Tensor:
        """x: [..., K]. product: to [..., N]. to_input: from the gradient [..., N] to that of x."""
        ctx.to_input, ctx.dtype = to_input, x.dtype
        return product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """For x alone."""
        (gradient,) = gradients
        return ctx.to_input(gradient).to(ctx.dtype), None, None


def through(x: Tensor, product: Map, to_input: Map) -> Tensor:
    """The product, with a gradient where one is asked for."""
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = StraightThrough.apply(x, product, to_input)
        return out
    return product(x)
