"""`lobcq::quantize_states`, `lobcq::dequantize_states`: the keys and values of a cache, to rows of bytes and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, absmax_row_scale, decode, encode
from lobcq_fx.format.state_rows import StateRows
from lobcq_fx.ops.operand_checks import check, check_fake, refuse_gradient
from lobcq_fx.ops.schemas import DEQUANTIZE_STATES, QUANTIZE_STATES

Decoder = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""Called with codes, selectors, scales, tensor scales, codebooks, K and L_A; returns fp32 [R, K]."""


def quantize_states(x: Tensor, codebooks: Tensor, array_size: int) -> Tensor:
    """Encode keys or values, each head by itself, with a tensor scale for each token.

    Args:
        x: [B, H, T, D], fp32, bf16 or fp16.
        codebooks: int8 [N_c, 16].
        array_size: L_A.

    Returns:
        uint8 [B, T, row_bytes], laid out as `StateRows` says. A token with NaN or infinity in any head decodes to
        NaN in all of them.

    Raises:
        OperandError: an operand is not what `contracts` says.
        LobcqError: x requires a gradient.
    """
    check(QUANTIZE_STATES, locals())
    refuse_gradient(x)
    batch, heads, tokens, width = x.shape
    spec = FormatSpec(codebooks.shape[0], array_size)
    layout = StateRows(spec, heads, width)
    tensor_scale = absmax_row_scale(x.transpose(1, 2).flatten(2))
    one = encode(x.reshape(batch * heads * tokens, width), spec, codebooks, layout.of_heads(tensor_scale))
    return layout.join(one.codes, one.selectors, one.scales, tensor_scale)


def decode_states(
    decoder: Decoder, rows: Tensor, codebooks: Tensor, heads: int, width: int, array_size: int, dtype: torch.dtype
) -> Tensor:
    """Decode keys or values, by a device's decoder.

    Args:
        decoder: of operands [R, K].
        rows: uint8 [B, P, row_bytes] from `lobcq::quantize_states`.
        codebooks: int8 [N_c, 16].
        heads, width: H and D.
        array_size: L_A.
        dtype: of the result, to which the decoded fp32 is rounded.

    Returns:
        [B, H, P, D] in `dtype`, contiguous.

    Raises:
        OperandError: an operand is not what `contracts` says.
    """
    check(DEQUANTIZE_STATES, locals())
    layout = StateRows(FormatSpec(codebooks.shape[0], array_size), heads, width)
    decoded = decoder(*layout.split(rows), codebooks, width, array_size)
    return decoded.to(dtype).view(rows.shape[0], heads, rows.shape[1], width)


def _decode(
    codes: Tensor, selectors: Tensor, scales: Tensor, tensor_scale: Tensor, codebooks: Tensor, columns: int,
    array_size: int,
) -> Tensor:  # fmt: skip
    spec = FormatSpec(codebooks.shape[0], array_size)
    return decode(Encoded(codes, selectors, scales, tensor_scale, codebooks, spec, columns))


dequantize_states = partial(decode_states, _decode)
"""By the format alone."""

torch.library.impl(QUANTIZE_STATES, "CompositeExplicitAutograd", quantize_states)
torch.library.impl(DEQUANTIZE_STATES, "CompositeExplicitAutograd", dequantize_states)


@torch.library.register_fake(QUANTIZE_STATES)
def _quantize_fake(x: Tensor, codebooks: Tensor, array_size: int) -> Tensor:
    check_fake(QUANTIZE_STATES, locals())
    batch, heads, tokens, width = x.shape
    row_bytes = StateRows(FormatSpec(codebooks.shape[0], array_size), heads, width).row_bytes
    return x.new_empty((batch, tokens, row_bytes), dtype=torch.uint8)


@torch.library.register_fake(DEQUANTIZE_STATES)
def _dequantize_fake(
    rows: Tensor, codebooks: Tensor, heads: int, width: int, array_size: int, dtype: torch.dtype
) -> Tensor:
    check_fake(DEQUANTIZE_STATES, locals())
    return rows.new_empty((rows.shape[0], heads, rows.shape[1], width), dtype=dtype)
