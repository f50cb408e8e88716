"""`lobcq::chunk_scan`: default implementation and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.errors import OperandError
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import CHUNK_SCAN


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, dt_min: float, dt_max: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2, state = exp(dt A) state + dt x B^T, y = state C, a chunk of tokens at a time.

    Args:
        x: fp32 [B, T, H, P], the heads' inputs.
        dt: fp32 [B, T, H], time steps.
        A: fp32 [H].
        B, C: fp32 [B, T, G, N], each group for H / G heads in turn.
        state: fp32 [B, H, P, N], of the tokens before; zeros where there are none.
        dt_min, dt_max: time steps of several tokens are clamped to; that of one token is not, as in its kernels.
        chunk_size: tokens that are multiplied at once.

    Returns:
        y, fp32 [B, T, H, P], and the state after the last token; both contiguous.

    Raises:
        OperandError: an operand is not what `contracts` says, heads are no multiple of groups, or there is no chunk.
    """
    check(CHUNK_SCAN, locals())
    tokens, heads = x.shape[1:3]
    groups = B.shape[2]
    if groups == 0 or heads % groups:
        raise OperandError(f"{CHUNK_SCAN}: B has {groups} groups for {heads} heads: pass a divisor")
    if chunk_size < 1:
        raise OperandError(f"{CHUNK_SCAN}: chunk_size is {chunk_size}: pass 1 or more")
    B, C = (one.repeat_interleave(heads // groups, dim=2) for one in (B, C))
    if tokens == 1:
        return _step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
    dt = dt.clamp(dt_min, dt_max)
    x, decay = x * dt[..., None], dt * A
    y, state = x.new_empty(x.shape), state.clone(memory_format=torch.contiguous_format)
    for start in range(0, tokens, chunk_size):
        part = slice(start, start + chunk_size)
        y[:, part], state = _chunk(state, *(one[:, part].transpose(1, 2) for one in (x, decay, B, C)))
    return y, state


def _step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    added = (dt[..., None] * x)[..., None] * B[:, :, None]
    state = torch.addcmul(added, state, (dt * A).exp()[..., None, None])
    return (state @ C[..., None]).squeeze(-1)[:, None].contiguous(), state.contiguous()


def _chunk(state: Tensor, x: Tensor, decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, L, H, P] and the state after a chunk, of [B, H, L, ...] operands; x is multiplied with dt already."""
    size = decay.shape[2]
    since_start = decay.cumsum(2)
    # Sums of the decays from each token to each later one, not differences of `since_start`, which would cancel.
    below = torch.ones((size, size), dtype=torch.bool, device=x.device).tril(-1)
    between = decay[..., None].expand(*decay.shape, size).masked_fill(~below, 0).cumsum(2)
    between = between.masked_fill(below.T, float("-inf")).exp()
    y = (C @ B.mT * between) @ x + (C @ state.mT) * since_start.exp()[..., None]
    to_end = (since_start[..., -1:] - since_start).exp()
    state = state * since_start[..., -1].exp()[..., None, None] + (x * to_end[..., None]).mT @ B
    return y.transpose(1, 2), state


torch.library.impl(CHUNK_SCAN, "CompositeExplicitAutograd", chunk_scan)


@torch.library.register_fake(CHUNK_SCAN)
def _fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, dt_min: float, dt_max: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    check_fake(CHUNK_SCAN, locals())
    return x.new_empty(x.shape), state.new_empty(state.shape)
