"""`lobcq::selective_scan`: default implementation and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import SELECTIVE_SCAN

BLOCK = 64
"""Tokens whose states are in memory at a time."""


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba: state = exp(dt A) state + dt B x, y = C state, token by token.

    Args:
        x: fp32 [B, I, T], the channels' inputs.
        dt: fp32 [B, I, T], time steps.
        A: fp32 [I, N].
        B, C: fp32 [B, T, N].
        state: fp32 [B, I, N], of the tokens before; zeros where there are none.

    Returns:
        y, fp32 [B, I, T], and the state after the last token; both contiguous.

    Raises:
        OperandError: an operand is not what `contracts` says.
    """
    check(SELECTIVE_SCAN, locals())
    y, state = x.new_empty(x.shape), state.clone(memory_format=torch.contiguous_format)
    for start in range(0, x.shape[2], BLOCK):
        part = slice(start, start + BLOCK)
        decay = (dt[:, :, part, None] * A[:, None]).exp()
        states = (dt[:, :, part] * x[:, :, part])[..., None] * B[:, None, part]
        for token in range(states.shape[2]):
            state = torch.addcmul(states[:, :, token], decay[:, :, token], state)
            states[:, :, token] = state
        y[:, :, part] = (states.transpose(1, 2) @ C[:, part, :, None]).squeeze(-1).transpose(1, 2)
    return y, state


torch.library.impl(SELECTIVE_SCAN, "CompositeExplicitAutograd", selective_scan)


@torch.library.register_fake(SELECTIVE_SCAN)
def _fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    check_fake(SELECTIVE_SCAN, locals())
    return x.new_empty(x.shape), state.new_empty(state.shape)
