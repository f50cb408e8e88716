"""The cache of an encoder-decoder: keys and values of its decoder's self-attentions and of its cross-attentions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.growing_cache import grow


def new_cache() -> EncoderDecoderCache:
    """An empty cache, which grows."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def is_filled(cache: EncoderDecoderCache) -> bool:
    """Whether a cache has the cross-attention's keys and values."""
    return bool(cache.is_updated) and all(cache.is_updated.values())


def states_of(cache: Cache, heads: Sequence[tuple[int, int, int]], batch: int) -> list[Tensor]:
    """Keys and values of each layer in turn.

    Raises:
        CallError: the cache is of another kind, model or batch.
    """
    if len(cache.layers) != len(heads):
        raise CallError(f"past_key_values has {len(cache.layers)} layers; the decoder has {len(heads)}")
    states = []
    for layer, (count, *widths) in zip(cache.layers, heads, strict=True):
        if type(layer) is not DynamicLayer:
            raise CallError(
                f"past_key_values holds a {type(layer).__name__}; the graph grows DynamicLayers: pass"
                " EncoderDecoderCache(DynamicCache(), DynamicCache())"
            )
        for state, width in zip((layer.keys, layer.values), widths, strict=True):
            if (state.shape[0], state.shape[1], state.shape[3]) != (batch, count, width):
                raise CallError(
                    f"past_key_values holds states of {list(state.shape)}; this call's are [{batch}, {count}, any,"
                    f" {width}]: pass the cache of these sequences, or a new one"
                )
            states.append(state)
    return states


def fill_cross(cache: EncoderDecoderCache, states: Sequence[Tensor]) -> None:
    """Put the cross-attention's keys and values into a cache, for all calls that follow."""
    grow(cache.cross_attention_cache, states)
    cache.is_updated = dict.fromkeys(range(len(states) // 2), True)
