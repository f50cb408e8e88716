"""Linears on weights as they are stored, for devices whose kernels decode and leave the product to torch.

Where a device's kernels decode what the format does, the results are those of the default implementations, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format import Int8Activation, product_in_fp32, scale_product
from lobcq_fx.ops.operand_checks import check
from lobcq_fx.ops.schemas import LINEAR, LINEAR_FLOAT_ACTIVATION, LINEAR_INT8_ACTIVATION


@dataclass(frozen=True)
class StoredLinears:
    """`lobcq::linear`, its `.int8_activation` and `.float_activation`.

    scaled_entries: called with an operand's codes, selectors, scales and codebooks, its number of columns and L_A, any
        leading dimensions; returns entries times block-array scales, fp32 [R, K].
    """

    scaled_entries: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]

    def linear(
        self,
        codes: Tensor,
        selectors: Tensor,
        scales: Tensor,
        tensor_scale: Tensor,
        codebooks: Tensor,
        w_codes: Tensor,
        w_selectors: Tensor,
        w_scales: Tensor,
        w_tensor_scale: Tensor,
        w_codebooks: Tensor,
        bias: Tensor | None,
        in_features: int,
        array_size: int,
        dtype: torch.dtype,
        activation_array_size: int | None = None,
    ) -> Tensor:
        """W4A4; see `lobcq_fx.ops.linear`."""
        check(LINEAR, locals())
        a = self.scaled_entries(codes, selectors, scales, codebooks, in_features, activation_array_size or array_size)
        w = self.scaled_entries(w_codes, w_selectors, w_scales, w_codebooks, in_features, array_size)
        out = scale_product(product_in_fp32(a, w), tensor_scale.reshape(-1, 1), w_tensor_scale, bias)
        return out.to(dtype).view(*codes.shape[:-1], w_codes.shape[0])

    def linear_int8_activation(
        self,
        entries: Tensor,
        scales: Tensor,
        tensor_scale: Tensor,
        w_codes: Tensor,
        w_selectors: Tensor,
        w_scales: Tensor,
        w_tensor_scale: Tensor,
        w_codebooks: Tensor,
        bias: Tensor | None,
        in_features: int,
        array_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """W4A8; see `lobcq_fx.ops.linear`."""
        check(LINEAR_INT8_ACTIVATION, locals())
        a = Int8Activation.flattened(entries, scales, tensor_scale, in_features)
        w = self.scaled_entries(w_codes, w_selectors, w_scales, w_codebooks, in_features, array_size)
        out = scale_product(product_in_fp32(a.scaled_entries(), w), a.tensor_scale, w_tensor_scale, bias)
        return out.to(dtype).view(*entries.shape[:-1], w_codes.shape[0])

    def linear_float_activation(
        self,
        x: Tensor,
        w_codes: Tensor,
        w_selectors: Tensor,
        w_scales: Tensor,
        w_tensor_scale: Tensor,
        w_codebooks: Tensor,
        bias: Tensor | None,
        array_size: int,
    ) -> Tensor:
        """W4A16; see `lobcq_fx.ops.linear`."""
        check(LINEAR_FLOAT_ACTIVATION, locals())
        w = self.scaled_entries(w_codes, w_selectors, w_scales, w_codebooks, x.shape[-1], array_size) * w_tensor_scale
        return product_in_fp32(x.float(), w, None if bias is None else bias.float()).to(x.dtype)
