"""`lobcq::weight_squares`: default implementation and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec
from lobcq_fx.format.error import row_squares
from lobcq_fx.ops.dequantize_weight import decoded_weight
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import WEIGHT_SQUARES


def weight_squares(
    w: Tensor,
    w_codes: Tensor,
    w_selectors: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor,
    w_codebooks: Tensor,
    array_size: int,
) -> Tensor:
    """Of each row of a weight the sum of its squares, and that of its distances from what it is encoded as.

    Args:
        w: [N, K], fp32, bf16 or fp16.
        w_codes: uint8 [N, Kp/2].
        w_selectors: uint8 [N, ceil(Kp/8 * log2(N_c) / 8)].
        w_scales: float8_e4m3fn [N, Kp/L_A].
        w_tensor_scale: fp32 [].
        w_codebooks: int8 [N_c, 16].
        array_size: L_A.

    Returns:
        fp64 [N, 2]. Kernels agree up to the order in which doubles are added.

    Raises:
        OperandError: an operand is not what `contracts` says.
    """
    check(WEIGHT_SQUARES, locals())
    spec, columns = FormatSpec(w_codebooks.shape[0], array_size), w.shape[1]
    encoded = Encoded(w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, spec, columns)
    return row_squares(w, encoded, decoded_weight)


torch.library.impl(WEIGHT_SQUARES, "CompositeExplicitAutograd", weight_squares)


@torch.library.register_fake(WEIGHT_SQUARES)
def _fake(
    w: Tensor,
    w_codes: Tensor,
    w_selectors: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor,
    w_codebooks: Tensor,
    array_size: int,
) -> Tensor:
    check_fake(WEIGHT_SQUARES, locals())
    return w.new_empty((w.shape[0], 2), dtype=torch.float64)
