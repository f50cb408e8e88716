"""`lobcq::quantize_activation`: default implementation and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, absmax_row_scale, encode
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import QUANTIZE_ACTIVATION

Packed = tuple[Tensor, Tensor, Tensor, Tensor]


def quantize_activation(x: Tensor, codebooks: Tensor, array_size: int, static_scale: Tensor | None = None) -> Packed:
    """Encode x along its last dimension.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        codebooks: int8 [N_c, 16].
        array_size: L_A.
        static_scale: fp32 [], a calibrated tensor scale; None computes one for each row.

    Returns:
        codes uint8 [..., Kp/2], selectors uint8 [..., ceil(Kp/8 * log2(N_c) / 8)], scales float8_e4m3fn [..., Kp/L_A],
        tensor_scale fp32 [..., 1]. A row that holds NaN or infinity gets a NaN tensor scale.

    Raises:
        OperandError: an operand is not what `contracts` says; a static scale that is not positive and finite.
    """
    check(QUANTIZE_ACTIVATION, locals())
    leading = x.shape[:-1]
    rows = x.reshape(leading.numel(), x.shape[-1])
    row_scale = absmax_row_scale(rows) if static_scale is None else static_scale.expand(rows.shape[0], 1)
    encoded = encode(rows, FormatSpec(codebooks.shape[0], array_size), codebooks, row_scale)
    parts = (encoded.codes, encoded.selectors, encoded.scales, encoded.tensor_scale.contiguous())
    codes, selectors, scales, tensor_scale = (part.view(*leading, part.shape[1]) for part in parts)
    return codes, selectors, scales, tensor_scale


# As a decorator this call would replace the function by None.
torch.library.impl(QUANTIZE_ACTIVATION, "CompositeExplicitAutograd", quantize_activation)


@torch.library.register_fake(QUANTIZE_ACTIVATION)
def _fake(x: Tensor, codebooks: Tensor, array_size: int, static_scale: Tensor | None = None) -> Packed:
    check_fake(QUANTIZE_ACTIVATION, locals())
    spec = FormatSpec(codebooks.shape[0], array_size)
    leading, columns = x.shape[:-1], x.shape[-1]
    return (
        x.new_empty((*leading, spec.code_bytes(columns)), dtype=torch.uint8),
        x.new_empty((*leading, spec.selector_bytes(columns)), dtype=torch.uint8),
        x.new_empty((*leading, spec.num_arrays(columns)), dtype=torch.float8_e4m3fn),
        x.new_empty((*leading, 1), dtype=torch.float32),
    )
