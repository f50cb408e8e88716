"""`lobcq::quantize_weight`: default implementation and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, encode
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import QUANTIZE_WEIGHT

Packed = tuple[Tensor, Tensor, Tensor, Tensor]


def quantize_weight(w: Tensor, codebooks: Tensor, array_size: int) -> Packed:
    """Encode a weight.

    Args:
        w: [N, K], fp32, bf16 or fp16.
        codebooks: int8 [N_c, 16].
        array_size: L_A.

    Returns:
        codes uint8 [N, Kp/2], selectors uint8 [N, ceil(Kp/8 * log2(N_c) / 8)], scales float8_e4m3fn [N, Kp/L_A],
        tensor_scale fp32 [].

    Raises:
        OperandError: an operand is not what `contracts` says.
        ValueError: w holds NaN or infinity (names the first bad index).
    """
    check(QUANTIZE_WEIGHT, locals())
    encoded = encode(w, FormatSpec(codebooks.shape[0], array_size), codebooks)
    return encoded.codes, encoded.selectors, encoded.scales, encoded.tensor_scale


# As a decorator this call would replace the function by None.
torch.library.impl(QUANTIZE_WEIGHT, "CompositeExplicitAutograd", quantize_weight)


@torch.library.register_fake(QUANTIZE_WEIGHT)
def _fake(w: Tensor, codebooks: Tensor, array_size: int) -> Packed:
    check_fake(QUANTIZE_WEIGHT, locals())
    spec = FormatSpec(codebooks.shape[0], array_size)
    rows, columns = w.shape
    return (
        w.new_empty((rows, spec.code_bytes(columns)), dtype=torch.uint8),
        w.new_empty((rows, spec.selector_bytes(columns)), dtype=torch.uint8),
        w.new_empty((rows, spec.num_arrays(columns)), dtype=torch.float8_e4m3fn),
        w.new_empty((), dtype=torch.float32),
    )
