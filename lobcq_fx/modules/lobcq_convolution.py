"""A convolution on a packed weight, one whose windows share nothing: a packed linear of each window."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lobcq_fx.errors import OperandError
from lobcq_fx.format import FormatSpec
from lobcq_fx.modules.lobcq_linear import LobcqLinear
from lobcq_fx.modules.packed_product import LayoutOf, LinearSettings
from lobcq_fx.modules.packed_weight import PackedWeight, empty_weight
from lobcq_fx.modules.windows import Windows


class LobcqConvolution(LobcqLinear):
    """A patch embedding, or a convolution with kernels of one: [B, C, *image] or [C, *image] to [B, N, *windows].

    weight: the packed weight [N, K], K = C * prod(windows.sizes), in the order of the float weight. bias: [N], or None.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        settings: LinearSettings,
        layout_of: LayoutOf,
        windows: Windows,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """A layer without content, as `LobcqLinear`.

        Args:
            windows: what it reads. dtype: also of the images, which callers ask the weight for.
        """
        super().__init__(shape, bias, settings, layout_of, dtype=dtype, device=device)
        self.windows = windows
        self.weight = _ImageWeight(shape, settings.spec, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """The product, as `LobcqLinear.forward`; the result has its channels beside each other in memory.

        Raises:
            OperandError: x is no image of C channels. LobcqError: the bias is to be trained.
        """
        count = len(self.windows.sizes)
        channels = self.in_features // prod(self.windows.sizes)
        if x.dim() not in (count + 1, count + 2) or x.shape[-count - 1] != channels:
            image = ", ".join(["B", str(channels), *("any" for _ in self.windows.sizes)])
            raise OperandError(f"x is {list(x.shape)}: the layer takes [{image}], or one without B")
        rows = super().forward(self.windows.rows(_run, x, x.dim()))
        out: Tensor = self.windows.image(_run, rows, x.dim())
        return out

    def extra_repr(self) -> str:
        """What a linear has, and the windows."""
        return f"{super().extra_repr()}, windows={self.windows.sizes}, steps={self.windows.steps}"


class _ImageWeight(PackedWeight):
    """A packed weight of the dtype that its images have: vision models cast them to what their first weight is."""

    def __init__(self, shape: tuple[int, int], spec: FormatSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(empty_weight(shape, spec, device))
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """What the float weight would have."""
        return self._dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype
        return super()._apply(fn, recurse)


def _run(target: Any, *args: Any) -> Any:
    return target(*args)
