"""How a recurrent or hybrid language model is called: states of a fixed size beside, or instead of, keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.causal_lm_call import CausalLMCall, call_arguments, input_ids_of
from lobcq_fx.frontends.recurrent_states import LayerStates, holds_tokens

NO_STATIC_CACHE = (
    "the model keeps states of a fixed size beside or instead of keys and values, of which static caches are not served"
)


@dataclass(frozen=True)
class RecurrentCall(CausalLMCall):
    """Calls of a traced language model with states.

    The graph takes, and returns, keys and values of the layers that attend, then the states of a fixed size of all
    layers. It starts from the states of earlier calls; zeros are those of no tokens.

    cache_heads: of the layers that attend alone.
    layers: what each layer keeps.
    """

    kind: ClassVar[str] = "recurrent_causal_lm"

    layers: tuple[LayerStates, ...] = ()

    @property
    def attends(self) -> bool:
        """Whether any layer keeps keys and values, which count tokens."""
        return bool(self.cache_heads)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What `CausalLMCall.flatten` gives, with the keys and values there are; then the states of a fixed size."""
        call = call_arguments(args, kwargs)
        ids = input_ids_of(call)
        layers = self._layers(call.get("past_key_values"))
        past = self._keys_and_values(layers, ids)
        states = self._fixed(layers, ids)
        if not self.attends:
            call = {**call, "attention_mask": _of_new_tokens(call.get("attention_mask"), ids)}
        first_key = past[0] if past else torch.empty((ids.shape[0], 1, 0, 1), dtype=torch.uint8, device="meta")
        return [*self.inputs_of(call, ids, first_key, first_key.shape[2]), *past, *states]

    @property
    def arity(self) -> tuple[int, int]:
        """Those of `CausalLMCall`, and the states of a fixed size."""
        inputs, outputs = super().arity
        states = sum(len(layer.fixed) for layer in self.layers)
        return inputs + states, outputs + states

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecurrentCall:
        """Inverse of `to_dict`.

        Raises:
            ValueError: it is damaged, as for `CausalLMCall`, or its layers do not fit its heads.
        """
        settings = {key: value for key, value in values.items() if key != "kind"}
        layers = tuple(LayerStates.from_dict(layer) for layer in settings.pop("layers"))
        call = cls(**cls.settings_from(settings), layers=layers)
        attending = sum(layer.attends for layer in layers)
        if attending != len(call.cache_heads) or not any(layer.fixed for layer in layers):
            raise ValueError(f"cache_heads are of {len(call.cache_heads)} layers, of which {attending} attend")
        return call

    def name_of(self, place: int) -> str:
        """What a caller calls an input of the graph."""
        if place < len(self.inputs):
            return self.inputs[place]
        return f"past_key_values.layers[{[layer.attends for layer in self.layers].index(True)}].keys"

    def _layers(self, cache: Any) -> list[Any] | None:
        """A cache's layers, one for each of the model; None where it holds no tokens yet."""
        if cache is None:
            return None
        if not isinstance(cache, Cache):
            raise CallError(
                f"the cache is a {type(cache).__name__}: pass transformers.DynamicCache(config=model.config)"
            )
        if not any(holds_tokens(layer) for layer in cache.layers):
            return None
        if len(cache.layers) != len(self.layers):
            raise CallError(f"the cache has {len(cache.layers)} layers, the model {len(self.layers)}: pass its own")
        for kept, layer in zip(self.layers, cache.layers, strict=True):
            kept.check_kind(layer)
        return list(cache.layers)

    def _keys_and_values(self, layers: list[Any] | None, ids: Tensor) -> list[Tensor]:
        """Of every layer that attends in turn."""
        if layers is None:
            dtype = getattr(torch, self.cache_dtype)
            shapes = [(ids.shape[0], heads, 0, width) for heads, *widths in self.cache_heads for width in widths]
            return [torch.empty(shape, dtype=dtype, device=ids.device) for shape in shapes]
        attending = [layer for kept, layer in zip(self.layers, layers, strict=True) if kept.attends]
        return [state for layer in attending for state in (layer.keys, layer.values)]

    def _fixed(self, layers: list[Any] | None, ids: Tensor) -> list[Tensor]:
        """The states of a fixed size of every layer in turn."""
        if layers is None:
            return [state.zeros(ids.shape[0], ids.device) for kept in self.layers for state in kept.fixed]
        found = []
        for kept, layer in zip(self.layers, layers, strict=True):
            for wanted, state in zip(kept.fixed, kept.tensors_of(layer), strict=True):
                shape, dtype = (ids.shape[0], *wanted.shape), getattr(torch, wanted.dtype)
                if state is None or (tuple(state.shape), state.dtype) != (shape, dtype):
                    has = "no state" if state is None else f"a {state.dtype} of {list(state.shape)}"
                    raise CallError(
                        f"the cache holds {has} where the call needs a {dtype} of {list(shape)}: pass a new"
                        " DynamicCache, or the one of this model and batch"
                    )
                found.append(state)
        return found

    def _grown(self, call: Mapping[str, Any], states: Sequence[Tensor]) -> Any:
        """Put the states of the graph into the caller's cache, as a Hugging Face model does; or into a new one."""
        cache = call.get("past_key_values")
        cache = DynamicCache() if cache is None else cache
        # As in `grow`; and a state that is a part of something larger would keep that alive.
        states = [state.contiguous() for state in states]
        keys_and_values, fixed = iter(states[: 2 * len(self.cache_heads)]), iter(states[2 * len(self.cache_heads) :])
        layers = []
        for kept in self.layers:
            keys, values = (next(keys_and_values), next(keys_and_values)) if kept.attends else (None, None)
            layers.append(kept.layer(keys, values, fixed))
        cache.layers = layers
        return cache


def _of_new_tokens(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """A mask [B, P + T] of the call's tokens alone: of those before, nothing is left to mask."""
    if mask is None or (mask.dim() == 2 and mask.shape[1] < ids.shape[1]):
        return mask  # the latter is refused
    return mask[:, mask.shape[1] - ids.shape[1] :]
