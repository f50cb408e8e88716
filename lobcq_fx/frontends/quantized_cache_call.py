"""How a decoder-only language model is called with a quantized cache, one that grows or one of a fixed length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lobcq_fx.frontends.causal_lm_call import CausalLMCall, input_ids_of
from lobcq_fx.frontends.growing_cache import tokens_in
from lobcq_fx.frontends.lobcq_cache import LobcqCache
from lobcq_fx.frontends.lobcq_static_cache import LobcqStaticLayer
from lobcq_fx.frontends.static_cache_call import StaticCacheCall
from lobcq_fx.tracing.calling import CallingConvention


@dataclass(frozen=True)
class QuantizedCacheCall(CallingConvention):
    """Calls of the graph that `QuantizeCache` makes of one for growing caches. It is never saved: the other one is.

    causal: how that one is called.
    row_bytes: of a token's keys, then values, in every layer.
    constants: what the pass wants as inputs behind the cache, on the model's device.
    """

    kind: ClassVar[str] = "quantized_cache"

    causal: CausalLMCall
    row_bytes: tuple[int, ...]
    constants: tuple[Tensor, ...]

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What `CausalLMCall.flatten` gives, with keys and values as rows uint8 [B, P, row_bytes]; then the constants.

        Raises:
            CallError: the cache holds tokens of another model or batch.
        """
        call = self.causal.arguments(args, kwargs)
        ids = input_ids_of(call)
        cache = call["past_key_values"]
        assert isinstance(cache, LobcqCache)
        rows = cache.rows(self.row_bytes, self.causal.windows, ids.shape[0], ids.device)
        heads, width, _ = self.causal.cache_heads[0]
        first_key = torch.empty((ids.shape[0], heads, rows[0].shape[1], width), dtype=torch.uint8, device="meta")
        return [*self.causal.inputs_of(call, ids, first_key, tokens_in(cache)), *rows, *self.constants]

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `CausalLMCall.unflatten`."""
        call = self.causal.arguments(args, kwargs)
        logits, *rows = outputs
        cache = call["past_key_values"]
        result = self.causal.output(logits, cache, call)  # may refuse the labels: then the cache stays as it was
        if call.get("use_cache") is not False:
            cache.grow(rows, self.causal.windows, input_ids_of(call).shape[1])
        return result

    @property
    def arity(self) -> tuple[int, int]:
        """Those of the other graph, and the constants."""
        inputs, outputs = self.causal.arity
        return inputs + len(self.constants), outputs

    def to_dict(self) -> dict[str, Any]:
        """What kind it is: the graph is made anew of the saved one, and so is this."""
        return {"kind": self.kind}


@dataclass(frozen=True)
class QuantizedStaticCacheCall(StaticCacheCall):
    """Calls of the graph that `QuantizeCache` makes of one for static caches; it is never saved either.

    row_bytes, constants: as those of `QuantizedCacheCall`.
    """

    kind: ClassVar[str] = "quantized_static_cache"
    layer_type = LobcqStaticLayer
    length_dimension = 1

    row_bytes: tuple[int, ...] = ()
    constants: tuple[Tensor, ...] = field(default=(), compare=False)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """As `StaticCacheCall.flatten`, with keys and values as rows uint8 [B, C, row_bytes]; then the constants.

        Raises:
            CallError: the cache is of another model or batch, or has no room for the call's tokens.
        """
        return [*super().flatten(args, kwargs), *self.constants]

    @property
    def arity(self) -> tuple[int, int]:
        """Those of the other graph, and the constants."""
        inputs, outputs = super().arity
        return inputs + len(self.constants), outputs

    def _states(self, batch: int, length: int) -> tuple[torch.dtype, list[tuple[int, ...]], str]:
        return torch.uint8, [(batch, length, width) for width in self.row_bytes], "[batch, length, bytes]"
