"""Cache layers that a graph with states is traced with, and the scans of transformers as operators.

The graph starts from the states it is given, zeros for those of no tokens, and returns the ones after: what the layers
of transformers write in place, these replace. The scans are loops over tokens, or over chunks of them, of which a graph
would hold as many rounds as the example has; as an operator one graph serves calls of any length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

import lobcq_fx.ops  # noqa: F401  (defines the ops called here)

lobcq = torch.ops.lobcq

CHUNK = 64
"""Tokens of a chunk of the gated delta rule, where a model does not say."""


class ReplacedStates(LinearAttentionLayer):  # type: ignore[misc]
    """States that a call replaces."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """The last inputs and the call's [B, C, K + T], of which the last K are kept."""
        last = self.conv_states[state_idx]
        whole = torch.cat([last.to(conv_states.dtype), conv_states], dim=-1)
        self.conv_states[state_idx] = whole[..., -last.shape[-1] :]
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep a state as it is."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class ReplacedStatesAndKeys(ReplacedStates, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """The same beside keys and values."""


class _Scans:
    """The functions of transformers that scan, by the names that its modules have for them."""

    def __init__(self) -> None:
        self._state: Tensor | None = None

    def hand_out(self, get: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        """`Cache.get_recurrent_state`, whose result the next scan starts from: Mamba's is not told."""

        def get_recurrent_state(cache: Cache, *args: Any, **kwargs: Any) -> Tensor | None:
            self._state = get(cache, *args, **kwargs)
            return self._state

        return get_recurrent_state

    def _start(self, given: Tensor | None, dims: int) -> Tensor:
        state = self._state if given is None else given
        self._state = None
        if state is None or state.dim() != dims:
            raise ValueError("a scan starts from a state that is none of its layer's cache as it is")
        return state.float()

    def selective_scan(
        self, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
        return_last_state: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """`mamba_selective_scan`."""
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        dt = functional.softplus(dt) if delta_softplus else dt
        state = self._start(None, 1 + A.dim())
        operands = (one.float() for one in (hidden_states, dt, A, B.transpose(1, 2), C.transpose(1, 2)))
        out, state = lobcq.selective_scan(*operands, state)
        out = out.to(hidden_states.dtype)
        out = out if D is None else out + hidden_states * D[None, :, None]
        out = out if z is None else out * functional.silu(z)
        return (out, state) if return_last_state else out

    def chunk_scan(
        self, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
        D: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
        dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """`mamba2_chunk_scan`."""
        dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        dt = functional.softplus(dt) if dt_softplus else dt
        state = self._start(initial_states, 4)
        x, *others = (one.float() for one in (hidden_states, dt, A, B, C))
        limits = [float(limit) for limit in dt_limit]
        out, state = lobcq.chunk_scan(x, *others, state, *limits, chunk_size)
        out = out if D is None else out + D[..., None] * x
        return (out, state) if return_final_states else out

    def gated_delta_rule(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = CHUNK,
        initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """`torch_chunk_gated_delta_rule`."""
        groups = value.shape[2] // key.shape[2]
        if groups != 1:
            query, key = (one.repeat_interleave(groups, dim=2) for one in (query, key))
        queries, keys, values, betas, decays = (one.transpose(1, 2).float() for one in (query, key, value, beta, g))
        if use_qk_l2norm_in_kernel:
            queries, keys = (one * torch.rsqrt((one * one).sum(dim=-1, keepdim=True) + 1e-6) for one in (queries, keys))
        state = self._start(initial_state, 4)
        queries = queries * queries.shape[-1] ** -0.5
        out, state = lobcq.gated_delta_rule(queries, keys, values, decays, betas, state, chunk_size)
        return out.transpose(1, 2).contiguous().to(query.dtype), state if output_final_state else None

    @property
    def by_name(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "mamba_selective_scan": self.selective_scan,
            "mamba2_chunk_scan": self.chunk_scan,
            "torch_chunk_gated_delta_rule": self.gated_delta_rule,
        }


@contextmanager
def scans_as_operators(model: nn.Module) -> Iterator[None]:
    """Within, the modules of a model call our operators where those of transformers scan."""
    scans = _Scans()
    sources = {type(module).__module__ for module in model.modules()}
    with ExitStack() as patches:
        patches.enter_context(_replaced(Cache, "get_recurrent_state", scans.hand_out(Cache.get_recurrent_state)))
        for source in (sys.modules[name] for name in sources):
            for name in scans.by_name.keys() & vars(source).keys():
                patches.enter_context(_replaced(source, name, scans.by_name[name]))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
