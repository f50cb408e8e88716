"""`lobcq::quantize_activation_int8`: default implementation and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, encode_int8
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import QUANTIZE_ACTIVATION_INT8

Encoded = tuple[Tensor, Tensor, Tensor]


def quantize_activation_int8(x: Tensor, array_size: int, static_scale: Tensor | None = None) -> Encoded:
    """Encode x along its last dimension in int8.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        array_size: L_A.
        static_scale: fp32 [], a calibrated tensor scale; None computes one for each row.

    Returns:
        entries int8 [..., Kp], scales float8_e4m3fn [..., Kp/L_A], tensor_scale fp32 [..., 1]. A row that holds NaN or
        infinity gets a NaN tensor scale.

    Raises:
        OperandError: an operand is not what `contracts` says; a static scale that is not positive and finite.
    """
    check(QUANTIZE_ACTIVATION_INT8, locals())
    leading = x.shape[:-1]
    rows = x.reshape(leading.numel(), x.shape[-1])
    row_scale = None if static_scale is None else static_scale.expand(rows.shape[0], 1)
    encoded = encode_int8(rows, array_size, row_scale)
    parts = (encoded.entries, encoded.scales, encoded.tensor_scale.contiguous())
    entries, scales, tensor_scale = (part.view(*leading, part.shape[1]) for part in parts)
    return entries, scales, tensor_scale


# As a decorator this call would replace the function by None.
torch.library.impl(QUANTIZE_ACTIVATION_INT8, "CompositeExplicitAutograd", quantize_activation_int8)


@torch.library.register_fake(QUANTIZE_ACTIVATION_INT8)
def _fake(x: Tensor, array_size: int, static_scale: Tensor | None = None) -> Encoded:
    check_fake(QUANTIZE_ACTIVATION_INT8, locals())
    spec, leading, columns = FormatSpec(1, array_size), x.shape[:-1], x.shape[-1]
    return (
        x.new_empty((*leading, spec.padded_columns(columns)), dtype=torch.int8),
        x.new_empty((*leading, spec.num_arrays(columns)), dtype=torch.float8_e4m3fn),
        x.new_empty((*leading, 1), dtype=torch.float32),
    )
