"""`lobcq::linear` (W4A4), `.int8_activation` (W4A8), `.float_activation` (W4A16): implementations and fake kernels.

A device whose kernels decode, and leave the product to torch, brings what decodes; all else is written once. The
results are then those of the default implementations, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, Int8Activation, product_in_fp32, scale_product
from lobcq_fx.format.encoded import scaled_entries as entries_of
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import LINEAR, LINEAR_FLOAT_ACTIVATION, LINEAR_INT8_ACTIVATION, argument_names


@dataclass(frozen=True)
class StoredLinears:
    """The linears of weights as they are stored.

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
        """`x @ w.T + bias` of two packed operands.

        Args:
            codes, selectors, scales, tensor_scale: an activation from `lobcq::quantize_activation`, any leading
                dimensions.
            codebooks: int8 [N_c, 16], the activation's.
            w_codes, w_selectors, w_scales, w_tensor_scale: a weight [N, K] packed as at rest, tensor scale fp32 [].
            w_codebooks: int8 [N_c, 16], the weight's.
            bias: [N] or None.
            in_features: K.
            array_size: L_A, of both operands.
            dtype: of the result.
            activation_array_size: L_A of the activation, where it is another.

        Returns:
            [..., N] in `dtype`; NaN in the rows whose tensor scale is NaN.

        Raises:
            OperandError: an operand is not what `contracts` says.
        """
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
        """`x @ w.T + bias` of an activation from `lobcq::quantize_activation_int8`; all else as in `linear`."""
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
        """`x @ w.T + bias` of a float activation [..., K] and a packed weight [N, K], in fp32; the result as x is."""
        check(LINEAR_FLOAT_ACTIVATION, locals())
        w = self.scaled_entries(w_codes, w_selectors, w_scales, w_codebooks, x.shape[-1], array_size) * w_tensor_scale
        return product_in_fp32(x.float(), w, None if bias is None else bias.float()).to(x.dtype)


def scaled_entries(
    codes: Tensor, selectors: Tensor, scales: Tensor, codebooks: Tensor, columns: int, array_size: int
) -> Tensor:
    """Entries times block-array scales, fp32 [R, K], of an operand with any leading dimensions, by the format alone."""
    rows, spec = codes.shape[:-1].numel(), FormatSpec(codebooks.shape[0], array_size)
    codes, selectors, scales = (part.reshape(rows, part.shape[-1]) for part in (codes, selectors, scales))
    unscaled = torch.ones((), dtype=torch.float32, device=codes.device)
    return entries_of(Encoded(codes, selectors, scales, unscaled, codebooks, spec, columns))


_DEFAULT = StoredLinears(scaled_entries)
linear, linear_float_activation = _DEFAULT.linear, _DEFAULT.linear_float_activation
linear_int8_activation = _DEFAULT.linear_int8_activation


def _fake_of(name: str) -> Callable[..., Tensor]:
    """The fake kernel of any of these ops, whose activation comes first."""
    names = argument_names(name)

    def fake(activation: Tensor, *rest: Any) -> Tensor:
        given = dict(zip(names, (activation, *rest), strict=False))  # those left to their defaults are absent
        check_fake(name, given)
        outputs, dtype = given["w_codes"].shape[0], given.get("dtype", activation.dtype)
        return activation.new_empty((*activation.shape[:-1], outputs), dtype=dtype)

    return fake


for _name, _implementation in (
    (LINEAR, linear),
    (LINEAR_INT8_ACTIVATION, linear_int8_activation),
    (LINEAR_FLOAT_ACTIVATION, linear_float_activation),
):
    torch.library.impl(_name, "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(_name, _fake_of(_name))
