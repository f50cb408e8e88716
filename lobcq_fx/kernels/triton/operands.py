"""What the GEMM kernels take besides a weight's lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format.spec import CODEBOOK_SIZE, FormatSpec
from lobcq_fx.kernels.triton.weight_layout import WeightTiles

LEAST_INTEGER_ARRAY = 32
"""An integer MMA multiplies 32 columns at a time: with smaller block arrays one sum would need several scales."""


@dataclass(frozen=True)
class Activation:
    """An activation in one of three forms.

    float (W4A16): `values` fp32, bf16 or fp16 [M, K].
    scaled entries: `values` fp16 [M, Kp], entry times block-array scale, which is exact; `row_scales`.
    entries: `values` int8 [M, Kp]; `array_scales`; `row_scales`.

    Encoded forms hold zeros from K on. The last dimension of `values` is contiguous.

    array_scales: fp32 [M, Kp / L_A], E4M3's numbers, with zeros up to whole tiles of weights.
    row_scales: fp32 [M, 1], tensor scales.
    """

    values: Tensor
    array_scales: Tensor | None = None
    row_scales: Tensor | None = None

    def check(self, codebooks: Tensor, spec: FormatSpec) -> None:
        """Refuse what no kernel multiplies with a weight of `spec`, whose codebooks are int8 [N_c, 16].

        Raises:
            ValueError: entries with block arrays too small for an integer MMA, or codebooks that are not aligned.
        """
        if codebooks.data_ptr() % CODEBOOK_SIZE:
            raise ValueError(f"codebooks at address {codebooks.data_ptr()}: align them to {CODEBOOK_SIZE} bytes")
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


@dataclass(frozen=True)
class Linear:
    """One of the linears that share an activation.

    weight: of N = `outputs` rows and the activation's columns.
    """

    weight: WeightTiles
    outputs: int
    epilogue: Epilogue
