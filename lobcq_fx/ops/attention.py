"""`lobcq::attention`: default implementation and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.errors import OperandError
from lobcq_fx.ops.operand_checks import Arguments, check, check_fake
from lobcq_fx.ops.schemas import ATTENTION
from lobcq_fx.ops.states import dequantize_states


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
) -> Tensor:
    """Scaled dot-product attention over cached keys and values, in fp32.

    Args:
        query: [B, Hq, T, D], fp32, bf16 or fp16.
        keys, values: rows of P tokens, uint8 [B, P, row_bytes] from `lobcq::quantize_states`.
        codebooks: int8 [N_c, 16], of both.
        mask: bool, False where a query does not look, or added to the scores; [B, Hq, T, P], any of these 1; or None.
        heads: H of keys and values, which divides Hq: each is read by as many query heads that follow one another.
        value_width: of a value's head; a key's is D.
        key_array_size, value_array_size: L_A.
        scale: of the products of queries and keys.

    Returns:
        [B, Hq, T, value_width] in the query's dtype; zeros for a query that looks nowhere.

    Raises:
        OperandError: an operand is not what `contracts` says, or `heads` does not divide Hq.
    """
    check_attention(locals())
    batch, query_heads, queries, width = query.shape
    key = dequantize_states(keys, codebooks, heads, width, key_array_size, torch.float32)
    value = dequantize_states(values, codebooks, heads, value_width, value_array_size, torch.float32)
    by_head = query.float().unflatten(1, (heads, query_heads // heads))
    scores = by_head @ key.unsqueeze(2).mT * scale
    if mask is not None:
        added = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()
        scores = scores + added.expand(batch, query_heads, queries, keys.shape[1]).unflatten(1, scores.shape[1:3])
    looks = (scores != -torch.inf).any(-1, keepdim=True)
    weights = torch.where(looks, scores.softmax(-1), 0.0)
    return (weights @ value.unsqueeze(2)).flatten(1, 2).to(query.dtype)


def check_attention(given: Arguments) -> None:
    """Check a call's operands, and its heads.

    Raises:
        OperandError: one is not what it has to be.
    """
    check(ATTENTION, given)
    query_heads, heads = given["query"].shape[1], given["heads"]
    if heads < 1 or query_heads % heads:
        raise OperandError(f"{ATTENTION}: heads is {heads}, which does not divide the {query_heads} of query")


torch.library.impl(ATTENTION, "CompositeExplicitAutograd", attention)


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
) -> Tensor:
    check_fake(ATTENTION, locals())
    return query.new_empty((*query.shape[:-1], value_width))
