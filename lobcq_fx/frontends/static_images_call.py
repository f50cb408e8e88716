"""A prompt with images on a static cache: the graph grows the cached states, which are written back where they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lobcq_fx.frontends.causal_lm_call import input_ids_of
from lobcq_fx.frontends.static_cache_call import StaticCacheCall
from lobcq_fx.frontends.vision_language_call import ImagesCall
from lobcq_fx.tracing.calling import CallingConvention


@dataclass(frozen=True)
class StaticImagesCall(CallingConvention):
    """Calls of the images' graph on a static cache. It is never saved: both it is made of are.

    images: how that graph is called. static: how the graph for static caches is.
    """

    kind: ClassVar[str] = "static_images"

    images: ImagesCall
    static: StaticCacheCall

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What `ImagesCall.flatten` gives, with the keys and values of the tokens so far.

        Raises:
            CallError: the cache is of another model or batch, or has no room for the call's tokens.
        """
        call = self.images.arguments(args, kwargs)
        ids, mask = input_ids_of(call), call.get("attention_mask")
        layers = self.static.layers_of(call["past_key_values"], ids)
        query, length = ids.shape[1], layers[0].keys.shape[2]
        self.static.check_room(layers[0], length, query, mask)
        past = int(layers[0].cumulative_length)
        states = [state[:, :, :past] for layer in layers for state in (layer.keys, layer.values)]
        call["attention_mask"] = None if mask is None else mask[:, : past + query]
        return [*self.images.inputs_of(call, ids, states[0], past), *states]

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `ImagesCall.unflatten`; the cache holds the call's tokens too."""
        call = self.images.arguments(args, kwargs)
        cache, query = call["past_key_values"], input_ids_of(call).shape[1]
        result = self.images.output(outputs[0], cache, call)
        states = iter(outputs[1:])
        for layer in cache.layers:
            for whole in (layer.keys, layer.values):
                grown = next(states)
                whole[:, :, : grown.shape[2]] = grown
        torch._foreach_add_([layer.cumulative_length for layer in cache.layers], query)
        return result

    @property
    def arity(self) -> tuple[int, int]:
        """Those of the images' graph."""
        return self.images.arity

    def to_dict(self) -> dict[str, Any]:
        """What kind it is."""
        return {"kind": self.kind}
