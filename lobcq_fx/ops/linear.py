"""`lobcq::linear` (W4A4), `.int8_activation` (W4A8), `.float_activation` (W4A16): defaults and fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, Int8Activation, decode, matmul, product_in_fp32
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import LINEAR, LINEAR_FLOAT_ACTIVATION, LINEAR_INT8_ACTIVATION


def linear(
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
        codes, selectors, scales, tensor_scale: an activation from `lobcq::quantize_activation`, any leading dimensions.
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
    leading = codes.shape[:-1]
    rows = leading.numel()
    a = Encoded(
        codes.reshape(rows, codes.shape[-1]),
        selectors.reshape(rows, selectors.shape[-1]),
        scales.reshape(rows, scales.shape[-1]),
        tensor_scale.reshape(rows, 1),
        codebooks,
        FormatSpec(codebooks.shape[0], activation_array_size or array_size),
        in_features,
    )
    w = _weight(w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, in_features, array_size)
    return matmul(a, w, bias).to(dtype).view(*leading, w_codes.shape[0])


def linear_int8_activation(
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
    w = _weight(w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, in_features, array_size)
    return matmul(a, w, bias).to(dtype).view(*entries.shape[:-1], w_codes.shape[0])


def linear_float_activation(
    x: Tensor,
    w_codes: Tensor,
    w_selectors: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor,
    w_codebooks: Tensor,
    bias: Tensor | None,
    array_size: int,
) -> Tensor:
    """`x @ w.T + bias` of a float activation [..., K] and a packed weight [N, K], in fp32; the result in x's dtype."""
    check(LINEAR_FLOAT_ACTIVATION, locals())
    w = _weight(w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, x.shape[-1], array_size)
    out = product_in_fp32(x.float(), decode(w), None if bias is None else bias.float())
    return out.to(x.dtype)


# As decorators these calls would replace the functions by None.
torch.library.impl(LINEAR, "CompositeExplicitAutograd", linear)
torch.library.impl(LINEAR_INT8_ACTIVATION, "CompositeExplicitAutograd", linear_int8_activation)
torch.library.impl(LINEAR_FLOAT_ACTIVATION, "CompositeExplicitAutograd", linear_float_activation)


@torch.library.register_fake(LINEAR)
def _fake_linear(
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
    check_fake(LINEAR, locals())
    return codes.new_empty((*codes.shape[:-1], w_codes.shape[0]), dtype=dtype)


@torch.library.register_fake(LINEAR_INT8_ACTIVATION)
def _fake_linear_int8_activation(
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
    check_fake(LINEAR_INT8_ACTIVATION, locals())
    return entries.new_empty((*entries.shape[:-1], w_codes.shape[0]), dtype=dtype)


@torch.library.register_fake(LINEAR_FLOAT_ACTIVATION)
def _fake_linear_float_activation(
    x: Tensor,
    w_codes: Tensor,
    w_selectors: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor,
    w_codebooks: Tensor,
    bias: Tensor | None,
    array_size: int,
) -> Tensor:
    check_fake(LINEAR_FLOAT_ACTIVATION, locals())
    return x.new_empty((*x.shape[:-1], w_codes.shape[0]))


def _weight(
    codes: Tensor,
    selectors: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    codebooks: Tensor,
    columns: int,
    array_size: int,
) -> Encoded:
    return Encoded(
        codes, selectors, scales, tensor_scale, codebooks, FormatSpec(codebooks.shape[0], array_size), columns
    )
