"""`lobcq::quantize_weight` and `lobcq::quantize_weight.searched`: default implementations and fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, encode
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import QUANTIZE_WEIGHT, QUANTIZE_WEIGHT_SEARCHED

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
    return _packed(encode(w, FormatSpec(codebooks.shape[0], array_size), codebooks))


def quantize_weight_searched(w: Tensor, codebooks: Tensor, array_size: int) -> Packed:
    """Encode a weight, each block array under the one of some neighbouring scales that costs least.

    Arguments, results and errors are those of `quantize_weight`.
    """
    check(QUANTIZE_WEIGHT_SEARCHED, locals())
    return _packed(encode(w, FormatSpec(codebooks.shape[0], array_size), codebooks, search_scales=True))


def _packed(encoded: Encoded) -> Packed:
    return encoded.codes, encoded.selectors, encoded.scales, encoded.tensor_scale


# As a decorator this call would replace the function by None.
torch.library.impl(QUANTIZE_WEIGHT, "CompositeExplicitAutograd", quantize_weight)
torch.library.impl(QUANTIZE_WEIGHT_SEARCHED, "CompositeExplicitAutograd", quantize_weight_searched)


@torch.library.register_fake(QUANTIZE_WEIGHT)
@torch.library.register_fake(QUANTIZE_WEIGHT_SEARCHED)
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
