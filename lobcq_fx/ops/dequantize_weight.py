"""`lobcq::dequantize_weight`: default implementation, fake kernel, and the op on an encoded weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, decode
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import DEQUANTIZE_WEIGHT


def dequantize_weight(
    w_codes: Tensor,
    w_selectors: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor,
    w_codebooks: Tensor,
    in_features: int,
    array_size: int,
) -> Tensor:
    """Decode a weight.

    Args:
        w_codes: uint8 [N, Kp/2].
        w_selectors: uint8 [N, ceil(Kp/8 * log2(N_c) / 8)].
        w_scales: float8_e4m3fn [N, Kp/L_A].
        w_tensor_scale: fp32 [].
        w_codebooks: int8 [N_c, 16].
        in_features: K.
        array_size: L_A.

    Returns:
        fp32 [N, K].

    Raises:
        OperandError: an operand is not what `contracts` says.
    """
    check(DEQUANTIZE_WEIGHT, locals())
    spec = FormatSpec(w_codebooks.shape[0], array_size)
    return decode(Encoded(w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, spec, in_features))


torch.library.impl(DEQUANTIZE_WEIGHT, "CompositeExplicitAutograd", dequantize_weight)


@torch.library.register_fake(DEQUANTIZE_WEIGHT)
def _fake(
    w_codes: Tensor,
    w_selectors: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor,
    w_codebooks: Tensor,
    in_features: int,
    array_size: int,
) -> Tensor:
    check_fake(DEQUANTIZE_WEIGHT, locals())
    return w_codes.new_empty((w_codes.shape[0], in_features), dtype=torch.float32)


def decoded_weight(w: Encoded) -> Tensor:
    """A weight's values, fp32 [N, K], by its device's kernel."""
    parts = (w.codes, w.selectors, w.scales, w.tensor_scale, w.codebooks)
    values: Tensor = torch.ops.lobcq.dequantize_weight(*parts, w.columns, w.spec.array_size)
    return values
