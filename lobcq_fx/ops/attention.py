"""`lobcq::attention`, over encoded and over float keys and values: default implementations and fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lobcq_fx.errors import OperandError
from lobcq_fx.format import Encoded, FormatSpec, encode_int8
from lobcq_fx.format.encoded import selected_entries
from lobcq_fx.format.int8_attention import StateEntries, attend_int8
from lobcq_fx.format.state_rows import StateRows
from lobcq_fx.ops.operand_checks import Arguments, check, check_fake, refuse_gradient
from lobcq_fx.ops.schemas import ATTENTION, ATTENTION_FLOAT_STATES
from lobcq_fx.ops.states import dequantize_states

WIDEST_HEAD = 1024
"""Scalars of a head up to which kernels attend."""


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    codebooks: Tensor,
    mask: Tensor | None,
    heads: int,
    value_width: int,
    key_array_size: int,
    value_array_size: int,
    scale: float,
    in_int8: bool = False,
) -> Tensor:
    """Scaled dot-product attention over cached keys and values.

    Args:
        query: [B, Hq, T, D], fp32, bf16 or fp16.
        keys, values: rows of P tokens, uint8 [B, P, row_bytes] from `lobcq::quantize_states`.
        codebooks: int8 [N_c, 16], of both.
        mask: bool, False where a query does not look, or added to the scores; [B, Hq, T, P], any of these 1; or None.
        heads: H of keys and values, which divides Hq: each is read by as many query heads that follow one another.
        value_width: of a value's head; a key's is D.
        key_array_size, value_array_size: L_A.
        scale: of the products of queries and keys.
        in_int8: False multiplies decoded keys and values in fp32, True integers: docs/format.md, "Attention in
            integers".

    Returns:
        [B, Hq, T, value_width] in the query's dtype; zeros for a query that looks nowhere.

    Raises:
        OperandError: an operand is not what `contracts` says, or `heads` does not divide Hq.
        LobcqError: the query requires a gradient.
    """
    check_attention(locals())
    batch, query_heads, queries, width = query.shape
    added = _added(mask, (batch, query_heads, queries, keys.shape[1]), query.device)
    if in_int8:
        rows = encode_int8(query.reshape(batch * query_heads * queries, width), key_array_size)
        key_entries = _entries(keys, codebooks, heads, width, key_array_size)
        value_entries = _entries(values, codebooks, heads, value_width, value_array_size)
        return attend_int8(rows, key_entries, value_entries, added, scale).to(query.dtype)
    key = dequantize_states(keys, codebooks, heads, width, key_array_size, torch.float32)
    value = dequantize_states(values, codebooks, heads, value_width, value_array_size, torch.float32)
    by_head = query.float().unflatten(1, (heads, query_heads // heads))
    scores = by_head @ key.unsqueeze(2).mT * scale
    added = added.unflatten(1, scores.shape[1:3])
    scores = torch.where(added == -torch.inf, -torch.inf, scores + added)
    looks = (scores != -torch.inf).any(-1, keepdim=True)
    weights = torch.where(looks, scores.softmax(-1), 0.0)
    return (weights @ value.unsqueeze(2)).flatten(1, 2).to(query.dtype)


def _added(mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """What a mask adds to the scores, fp32 [B, Hq, T, P]."""
    if mask is None:
        return torch.zeros((), dtype=torch.float32, device=device).expand(shape)
    added = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()
    return added.expand(shape)


def _entries(rows: Tensor, codebooks: Tensor, heads: int, width: int, array_size: int) -> StateEntries:
    layout = StateRows(FormatSpec(codebooks.shape[0], array_size), heads, width)
    codes, selectors, scales, tensor_scale = layout.split(rows)
    entries = selected_entries(Encoded(codes, selectors, scales, tensor_scale, codebooks, layout.spec, width))
    entries, by_array, by_token = (
        part.view(rows.shape[0], heads, rows.shape[1], part.shape[1])
        for part in (entries, scales.float(), tensor_scale)
    )
    return StateEntries(entries, by_array, by_token[:, 0, :, 0], width)


def check_attention(given: Arguments) -> None:
    """Check a call's operands, and its heads.

    Raises:
        OperandError: one is not what it has to be.
    """
    check(ATTENTION, given)
    refuse_gradient(given["query"])
    query_heads, heads = given["query"].shape[1], given["heads"]
    if heads < 1 or query_heads % heads:
        raise OperandError(f"{ATTENTION}: heads is {heads}, which does not divide the {query_heads} of query")


def attention_float_states(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, enable_gqa: bool
) -> Tensor:
    """`scaled_dot_product_attention`, for which a device may have a kernel of its own where there is one query.

    Args:
        query: [B, Hq, T, D], fp32, bf16 or fp16.
        key, value: [B, H, P, D] and [B, H, P, E], of the query's dtype.
        mask: as for `attention`.
        scale: None is D ** -0.5.
        enable_gqa: whether H may be less than Hq, which it divides.

    Returns:
        [B, Hq, T, E] in the query's dtype, the heads of a token side by side in memory.

    Raises:
        OperandError: an operand is not what `contracts` says, or H does not fit Hq.
        LobcqError: an operand requires a gradient.
    """
    check(ATTENTION_FLOAT_STATES, locals())
    for one in (query, key, value):
        refuse_gradient(one)
    query_heads, heads = query.shape[1], key.shape[1]
    if query_heads != heads and not (enable_gqa and heads and query_heads % heads == 0):
        raise OperandError(f"{ATTENTION_FLOAT_STATES}: key has {heads} heads, query {query_heads}")
    out = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


torch.library.impl(ATTENTION, "CompositeExplicitAutograd", attention)
torch.library.impl(ATTENTION_FLOAT_STATES, "CompositeExplicitAutograd", attention_float_states)


@torch.library.register_fake(ATTENTION)
def _fake(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    codebooks: Tensor,
    mask: Tensor | None,
    heads: int,
    value_width: int,
    key_array_size: int,
    value_array_size: int,
    scale: float,
    in_int8: bool = False,
) -> Tensor:
    check_fake(ATTENTION, locals())
    return query.new_empty((*query.shape[:-1], value_width))


@torch.library.register_fake(ATTENTION_FLOAT_STATES)
def _float_states_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, enable_gqa: bool
) -> Tensor:
    check_fake(ATTENTION_FLOAT_STATES, locals())
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)
