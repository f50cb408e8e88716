"""`lobcq::gated_delta_rule`: default implementation and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.errors import OperandError
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import GATED_DELTA_RULE


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The recurrence of Gated DeltaNet, a chunk of tokens at a time.

    Token by token: state = exp(decay) state; state += beta key (value - key state)^T; out = query state.

    Args:
        query, key: fp32 [B, H, T, K], scaled and normalized.
        value: fp32 [B, H, T, V].
        decay, beta: fp32 [B, H, T].
        state: fp32 [B, H, K, V], of the tokens before; zeros where there are none.
        chunk_size: tokens that are multiplied at once.

    Returns:
        out, fp32 [B, H, T, V], and the state after the last token; both contiguous.

    Raises:
        OperandError: an operand is not what `contracts` says, or there is no chunk.
    """
    check(GATED_DELTA_RULE, locals())
    if chunk_size < 1:
        raise OperandError(f"{GATED_DELTA_RULE}: chunk_size is {chunk_size}: pass 1 or more")
    out, state = value.new_empty(value.shape), state.clone(memory_format=torch.contiguous_format)
    if value.shape[2] == 1:
        state = state * decay.exp()[..., None]
        state = state + key.mT @ ((value - key @ state) * beta[..., None])
        return query @ state, state
    for start in range(0, value.shape[2], chunk_size):
        part = slice(start, start + chunk_size)
        out[:, :, part], state = _chunk(state, *(one[:, :, part] for one in (query, key, value, decay, beta)))
    return out, state


def _chunk(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """What a chunk's tokens write solves a triangular system: each subtracts what is there of it already."""
    since_start = decay.cumsum(2)
    later = torch.ones((decay.shape[2],) * 2, dtype=torch.bool, device=decay.device).triu(1)
    between = (since_start[..., None] - since_start[..., None, :]).masked_fill(later, float("-inf")).exp()
    from_start = since_start.exp()[..., None]
    weighted = key * beta[..., None]
    system = (weighted @ key.mT) * between
    wanted = value * beta[..., None] - (weighted * from_start) @ state
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = (query * from_start) @ state + ((query @ key.mT) * between) @ written
    to_end = (since_start[..., -1:] - since_start).exp()[..., None]
    return out, state * from_start[..., -1:, :] + (key * to_end).mT @ written


torch.library.impl(GATED_DELTA_RULE, "CompositeExplicitAutograd", gated_delta_rule)


@torch.library.register_fake(GATED_DELTA_RULE)
def _fake(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    check_fake(GATED_DELTA_RULE, locals())
    return value.new_empty(value.shape), state.new_empty(state.shape)
