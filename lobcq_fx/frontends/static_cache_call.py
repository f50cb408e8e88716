"""How a decoder-only language model is called with a static cache: memory of a fixed size, written in place.

The tensors of such a call stay where they are from step to step, and nothing here waits for a device: what is checked
there is what Python knows, and values only where they lie in the CPU's memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.causal_lm_call import CausalLMCall, guards_of, input_ids_of, kept_positions
from lobcq_fx.tracing.calling import CallingConvention
from lobcq_fx.tracing.guards import SizeGuards

STATIC_CACHE = "static_cache"
"""Name of the graph that serves such calls."""

REMEDY = "pass a new one from the model's static_cache(max_cache_len)"


@dataclass(frozen=True)
class StaticCacheCall(CallingConvention):
    """Calls of the graph for static caches.

    causal: how the graph for growing caches is called; the inputs before the cache are the same ones.
    guards: what the trace assumed of the sizes of those inputs and of the first key.
    """

    kind: ClassVar[str] = STATIC_CACHE
    layer_type: ClassVar[type[StaticLayer]] = StaticLayer
    length_dimension: ClassVar[int] = 2

    causal: CausalLMCall
    guards: SizeGuards = field(default_factory=SizeGuards)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What `CausalLMCall.flatten` gives, with the mask [B, C] and keys and values [B, H, C, D]; then positions [T].

        Raises:
            CallError: the cache is not one of `static_cache`, has another batch, or no room for the call's tokens.
        """
        call = self.causal.arguments(args, kwargs)
        ids = input_ids_of(call)
        batch, query = ids.shape
        layers = self.layers_of(call["past_key_values"], ids)
        length = layers[0].keys.shape[self.length_dimension]
        self.check_room(layers[0], length, query, call.get("attention_mask"))
        positions = layers[0].cumulative_length + torch.arange(query, dtype=torch.long, device=ids.device)
        mask = cache_mask(call.get("attention_mask"), batch, length, ids.device)
        values = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": self._position_ids(call.get("position_ids"), mask, positions, batch),
            "logits_to_keep": kept_positions(call.get("logits_to_keep"), query, ids.device),
        }
        inputs = [values[name] for name in self.causal.inputs]
        states = [state for layer in layers for state in (layer.keys, layer.values)]
        heads, width, _ = self.causal.cache_heads[0]
        first_key = torch.empty((batch, heads, length, width), dtype=torch.uint8, device="meta")
        self.guards.check([*inputs, first_key], self.causal.name_of)
        return [*inputs, *states, positions]

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `CausalLMCall.unflatten`; the cache, which the graph has written to, counts the call's tokens."""
        call = self.causal.arguments(args, kwargs)
        cache = call["past_key_values"]
        result = self.causal.output(outputs[0], cache, call)  # may refuse the labels: then nothing was counted
        torch._foreach_add_([layer.cumulative_length for layer in cache.layers], input_ids_of(call).shape[1])
        return result

    @property
    def arity(self) -> tuple[int, int]:
        """The same inputs and the positions, and the logits."""
        return self.causal.arity[0] + 1, 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"kind": self.kind, "guards": self.guards.to_list()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], causal: CausalLMCall) -> StaticCacheCall:
        """Inverse of `to_dict`, for the graph beside that of `causal`; earlier releases wrote no guards.

        Raises:
            ValueError: guards that are damaged, or about no input.
        """
        return cls(causal, guards_of(values, causal.inputs))

    def layers_of(self, cache: Any, ids: Tensor) -> list[StaticLayer]:
        """The cache's layers, with memory of the right sizes."""
        sizes, batch = self.causal.cache_heads, ids.shape[0]
        if len(cache.layers) != len(sizes):
            raise CallError(f"past_key_values has {len(cache.layers)} layers, the model {len(sizes)}: {REMEDY}")
        for layer in cache.layers:
            if type(layer) is not self.layer_type:
                kind = type(layer).__name__
                raise CallError(
                    f"past_key_values holds a {kind}; the graph keeps whole caches and windows them in its mask, in"
                    f" StaticLayers alone: {REMEDY}"
                )
        if not cache.layers[0].is_initialized:
            initialize(cache, self.causal, batch, ids.device)
        dtype, shapes, names = self._states(batch, cache.layers[0].keys.shape[self.length_dimension])
        states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
        for state, wanted in zip(states, shapes, strict=True):
            if (tuple(state.shape), state.dtype) != (wanted, dtype):
                raise CallError(
                    f"past_key_values holds a {state.dtype} of {list(state.shape)} for a call that needs a {dtype}"
                    f" of {list(wanted)} {names}: {REMEDY}"
                )
        return list(cache.layers)

    def _states(self, batch: int, length: int) -> tuple[torch.dtype, list[tuple[int, ...]], str]:
        """What keys and values have to be, in turn: their dtype, their shapes, and the names of the dimensions."""
        shapes: list[tuple[int, ...]] = [
            (batch, heads, length, width) for heads, *widths in self.causal.cache_heads for width in widths
        ]
        return getattr(torch, self.causal.cache_dtype), shapes, "[batch, heads, length, width]"

    def check_room(self, layer: StaticLayer, length: int, query: int, mask: Tensor | None) -> None:
        """That the call's tokens fit behind the cached ones, as far as that is known without waiting for a device."""
        if query > length:
            raise CallError(f"the cache has room for {length} tokens, the call has {query}: {REMEDY}, longer")
        if torch.compiler.is_compiling() or layer.cumulative_length.device.type != "cpu":
            return
        past = int(layer.cumulative_length)
        if past + query > length:
            room = f"room for {length} tokens and holds {past}"
            raise CallError(f"the cache has {room}, the call has {query} more: {REMEDY}, longer")
        if mask is not None and mask.dim() == 2 and mask.shape[1] not in (past + query, length):
            wanted = f"[{mask.shape[0]}, {past + query}], cached tokens included, or [{mask.shape[0]}, {length}]"
            raise CallError(f"attention_mask has shape {list(mask.shape)}: pass {wanted}")

    def _position_ids(self, given: Tensor | None, mask: Tensor, positions: Tensor, batch: int) -> Tensor:
        if given is not None:
            return given.expand(batch, positions.shape[0])
        self.causal.check_default_positions()
        if self.causal.positions_from_mask:
            return (mask.long().cumsum(-1) - 1).clamp(min=0).index_select(1, positions)
        return (positions + self.causal.first_position).expand(batch, positions.shape[0])


def is_static(cache: Any) -> bool:
    """Whether a cache has memory of a fixed size, so that the graph for such caches serves it, or refuses it."""
    return isinstance(cache, Cache) and any(isinstance(layer, StaticLayer) for layer in cache.layers)


def static_cache(config: Any, causal: CausalLMCall, max_cache_len: int) -> StaticCache:
    """A cache without memory yet, whole in every layer."""
    cache = StaticCache(config=config, max_cache_len=max_cache_len)
    cache.layers = [StaticLayer(max_cache_len=max_cache_len) for _ in causal.cache_heads]
    return cache


def initialize(cache: Cache, causal: CausalLMCall, batch: int, device: torch.device) -> None:
    """Allocate a cache's keys and values, and let it mark their addresses as static for CUDA graphs."""
    dtype = getattr(torch, causal.cache_dtype)
    for layer, (heads, key, value) in zip(cache.layers, causal.cache_heads, strict=True):
        empty = (torch.empty((batch, heads, 0, width), dtype=dtype, device=device) for width in (key, value))
        layer.lazy_initialization(*empty)


def cache_mask(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """A mask over the whole cache, int64 [B, C] or of the given one's dtype; causality hides what lies ahead."""
    if mask is None:
        return torch.ones((batch, length), dtype=torch.long, device=device)
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] > length:
        wanted = f"a 2-D one of at most [{batch}, {length}], cached tokens included"
        raise CallError(
            f"attention_mask has shape {list(mask.shape)}; the graph makes its own 4-D masks: pass {wanted}"
        )
    return functional.pad(mask, (0, length - mask.shape[1]))
