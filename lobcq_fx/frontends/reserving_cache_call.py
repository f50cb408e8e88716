"""How a decoder-only language model is called with a cache that appends in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.causal_lm_call import CausalLMCall, input_ids_of
from lobcq_fx.frontends.growing_cache import tokens_in
from lobcq_fx.frontends.reserving_cache import reserve
from lobcq_fx.frontends.static_cache_call import StaticCacheCall
from lobcq_fx.tracing.calling import CallingConvention


@dataclass(frozen=True)
class ReservingCacheCall(CallingConvention):
    """Calls of the graph for static caches, on a cache that is as long as the tokens that it will hold.

    It is never saved: the convention of that graph is.

    static: how that graph is called.
    """

    kind: ClassVar[str] = "reserving_cache"

    static: StaticCacheCall

    @property
    def causal(self) -> CausalLMCall:
        """How the graph for growing caches is called."""
        return self.static.causal

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What `CausalLMCall.flatten` gives, with room for the call's tokens in the states; then their positions [T].

        Raises:
            CallError: the cache holds tokens of another model or batch.
        """
        call = self.causal.arguments(args, kwargs)
        ids = input_ids_of(call)
        cache, (batch, query) = call["past_key_values"], ids.shape
        self._check(cache, batch)
        past = tokens_in(cache)
        heads, width, _ = self.causal.cache_heads[0]
        before, after = (
            torch.empty((batch, heads, length, width), dtype=torch.uint8, device="meta")
            for length in (past, past + query)
        )
        inputs = self.causal.inputs_of(call, ids, before, past)
        self.static.guards.check([*inputs, after], self.causal.name_of)
        like = torch.empty(batch, dtype=getattr(torch, self.causal.cache_dtype), device=ids.device)
        states = reserve(cache, self.causal.cache_heads, query, like)
        return [*inputs, *states, torch.arange(past, past + query, dtype=torch.long, device=ids.device)]

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `CausalLMCall.unflatten`; the cache, which the graph has written to, counts the call's tokens."""
        call = self.causal.arguments(args, kwargs)
        cache = call["past_key_values"]
        result = self.causal.output(outputs[0], cache, call)  # may refuse the labels: then nothing was counted
        if call.get("use_cache") is not False:
            for layer in cache.layers:
                layer.advance(input_ids_of(call).shape[1])
        return result

    @property
    def arity(self) -> tuple[int, int]:
        """Those of the graph for static caches."""
        return self.static.arity

    def to_dict(self) -> dict[str, Any]:
        """What kind it is: it is made anew of the saved one."""
        return {"kind": self.kind}

    def _check(self, cache: Any, batch: int) -> None:
        wanted = [(batch, heads, width) for heads, *widths in self.causal.cache_heads for width in widths]
        states = [state for layer in cache.layers if layer.is_initialized for state in (layer.keys, layer.values)]
        found = [(*state.shape[:2], state.shape[3]) for state in states]
        if found and found != wanted:
            raise CallError(
                f"past_key_values holds {len(cache.layers)} layers of {list(found[0])} [batch, heads, width], the call"
                f" needs {len(self.causal.cache_heads)} of {list(wanted[0])}: pass a new cache, or this batch's"
            )
