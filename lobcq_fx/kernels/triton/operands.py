"""What the GEMM kernels take besides a weight's lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format.spec import FormatSpec

LEAST_INTEGER_ARRAY = 32
"""An integer MMA multiplies 32 columns at a time: with smaller block arrays one sum would need several scales."""


@dataclass(frozen=True)
class Activation:
    """An activation in one of three forms.

    float (W4A16): `values` fp32, bf16 or fp16 [M, K].
    scaled entries: `values` fp16 [M, Kp], entry times block-array scale, which is exact; `row_scales`.
    entries: `values` int8 [M, Kp]; `array_scales`; `row_scales`.

    Encoded forms hold zeros from K on. The last dimension of `values` is contiguous.

    array_scales: uint8 [M, Kp / L_A], E4M3. row_scales: fp32 [M, 1], tensor scales.
    """

    values: Tensor
    array_scales: Tensor | None = None
    row_scales: Tensor | None = None

    def check(self, spec: FormatSpec) -> None:
        """Refuse what no kernel multiplies with a weight of `spec`.

        Raises:
            ValueError: entries with block arrays too small for an integer MMA.
        """
        if self.values.dtype == torch.int8 and spec.array_size < LEAST_INTEGER_ARRAY:
            raise ValueError(f"format {spec.name} has arrays below {LEAST_INTEGER_ARRAY}: encode to scaled entries")


@dataclass(frozen=True)
class Epilogue:
    """What follows the sum over K and the activation's row scales.

    weight_scale: fp32 []. bias: [N] or None. residual: [M, N], contiguous, or None, added to the rounded result.
    """

    weight_scale: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
