"""Routed experts on packed weights, as one of transformers' implementations of experts: `"lobcq"`.

Expert modules that transformers decorates for it keep their class, router and gate; what multiplies is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lobcq_fx.modules.lobcq_grouped_linear import LobcqGroupedLinear

IMPLEMENTATION = "lobcq"
STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""What those modules call their weights [E, N, K], or [E, K, N]."""


def runs_experts(module: nn.Module) -> bool:
    """Whether transformers lets a registered function run a module's experts."""
    return hasattr(module, "has_gate") and hasattr(module, "_apply_gate")


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a module of experts computes; token by token the numbers of transformers' `grouped_mm`.

    Args:
        module: with packed stacks, both of them, or none.
        hidden_states: [T, K].
        top_k_index: int64 [T, k], the experts of each token.
        top_k_weights: [T, k].

    Returns:
        As hidden_states.
    """
    first = module.gate_up_proj if module.has_gate else module.up_proj
    if not isinstance(first, LobcqGroupedLinear):  # excluded: another layer's are packed
        out: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, top_k_index, top_k_weights)
        return out
    tokens, chosen = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1))
    edges = torch.arange(1, first.num_experts + 1, dtype=experts.dtype, device=experts.device)
    ends = torch.searchsorted(experts, edges).to(torch.int32)
    states = first(hidden_states, ends, order // chosen)
    experts = experts.clamp(max=first.num_experts - 1)  # those beyond are other ranks', in no group and of weight 0
    if module.has_bias:
        states = states + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[experts]
    states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
    states = module.down_proj(states, ends)
    if module.has_bias:
        states = states + module.down_proj_bias[experts]
    if getattr(module, "has_post_expert_norm", False):  # older releases have none
        states = module.post_expert_norm(states)
    weighted = states * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    in_order = weighted[torch.argsort(order)].view(tokens, chosen, -1)
    result: Tensor = in_order.sum(dim=1).to(hidden_states.dtype)
    return result


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
