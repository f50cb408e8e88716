"""The cache of a decoder-only language model that grows: what a graph takes of it, and how it takes what that returns.

Layers that slide a window may be whole, as any other (DynamicLayer), or keep what the next token can still see
(DynamicSlidingWindowLayer, the last window - 1 positions): that is the caller's choice, as it is with a float model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.reserving_cache import ReservingLayer
from lobcq_fx.tracing.example import LARGEST_SIZE

LENGTH = -2
"""Dimension of the tokens in keys and values [B, H, P, D], and in encoded ones [B, P, row_bytes]."""

Windows = tuple[int | None, ...]
"""For each layer how many positions a token sees, itself included; None is all. Empty: the graph takes whole layers."""


def tokens_in(cache: Any) -> int:
    """How many tokens a cache has seen."""
    tokens: int = 0 if cache is None else cache.get_seq_length()
    return tokens


def is_empty(cache: Any) -> bool:
    """Whether there is no cache yet, or one that holds no tokens."""
    return tokens_in(cache) == 0


def windowed_cache(windows: Windows) -> DynamicCache:
    """An empty cache that keeps no more than a model with these windows needs."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer() if one is None else DynamicSlidingWindowLayer(one) for one in windows]
    return cache


def windows_from(given: Any, layers: int) -> Windows:
    """Those that a saved calling convention has, which are all of one size.

    Raises:
        ValueError: they are none of a model with so many layers.
    """
    windows = tuple(given)
    sizes = {one for one in windows if one is not None}
    if len(sizes) > 1 or any(type(one) is not int or not 1 < one < LARGEST_SIZE for one in sizes):
        raise ValueError(f"windows are {windows[:9]}, of which a model has one")
    if windows and (len(windows) != layers or not sizes):
        raise ValueError(f"windows are {windows[:9]}, for {layers} layers")
    return windows


def check_windows(cache: Cache, windows: Windows) -> None:
    """That layers of a cache that slide have the windows of the model.

    Raises:
        CallError: one forgets what the model still sees, or more than another does.
    """
    if len(cache.layers) != len(windows):
        raise CallError(f"past_key_values has {len(cache.layers)} layers, the model {len(windows)}: pass a new one")
    sliding = [
        layer.keys.shape[LENGTH]
        for layer, window in zip(cache.layers, windows, strict=True)
        if window and layer.is_initialized
    ]
    for layer, window in zip(cache.layers, windows, strict=True):
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window != window:
            raise CallError(
                f"past_key_values holds a {type(layer).__name__} of {layer.sliding_window} where the model's window is"
                f" {window or 'without an end'}: pass {type(cache).__name__}(config=model.config)"
            )
    if any(length != sliding[0] for length in sliding):
        raise CallError(
            f"past_key_values has layers of {sliding} positions that slide the same window: pass"
            f" {type(cache).__name__}(config=model.config), new or as a call returned it"
        )


def states_of(cache: Any, layers: int, windows: Windows) -> list[Tensor]:
    """Keys and values of every layer in turn, of a cache that holds tokens.

    Raises:
        CallError: it is none that the graph takes.
    """
    if not isinstance(cache, Cache) or len(cache.layers) != layers:
        raise CallError(f"past_key_values must be a DynamicCache of {layers} layers, not {cache!r}")
    known = (DynamicLayer, ReservingLayer, *((DynamicSlidingWindowLayer,) if windows else ()))
    for layer in cache.layers:
        if type(layer) not in known:
            kind = type(layer).__name__
            raise CallError(f"past_key_values holds a {kind}; the graph grows DynamicLayers: pass DynamicCache()")
    if windows:
        check_windows(cache, windows)
    return [state for layer in cache.layers for state in (layer.keys, layer.values)]


def grow(cache: Cache, states: Sequence[Tensor], windows: Windows = (), query: int = 0) -> None:
    """Put the grown keys and values of every layer in turn into a cache, as a Hugging Face model does.

    Args:
        cache: it may be empty; its layers that slide a window of the model do so.
        states: [B, H, P + T, D] each; of layers that slide, P may be less than all tokens before the call.
        windows: the model's.
        query: how many tokens the call had, T.
    """
    layers = []
    for place, (keys, values) in enumerate(zip(states[0::2], states[1::2], strict=True)):
        layer: Any = cache.layers[place] if place < len(cache.layers) and windows else None
        if type(layer) is DynamicSlidingWindowLayer and windows[place] is not None:
            keys, values = keep_window(layer, (keys, values), query)
        else:
            layer = DynamicLayer()
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        # A compiled prompt would lay its keys and values out as its projections did, and the next call be compiled for
        # those strides alone.
        layer.keys, layer.values = keys.contiguous(), values.contiguous()
        layers.append(layer)
    cache.layers = layers


def keep_window(layer: DynamicSlidingWindowLayer, states: Sequence[Tensor], query: int) -> list[Tensor]:
    """Let a layer count a call's tokens; of its grown keys and values return what it keeps, as its `update` does.

    While it records its past, which a `crop` may ask for, that is all.
    """
    layer.cumulative_length = layer.cumulative_length + query
    kept = layer.sliding_window - 1
    if layer.record_past or states[0].shape[LENGTH] <= kept:
        return list(states)
    # Copies, not views, which would keep the whole prompt's states alive.
    return [state[..., -kept:, :].clone(memory_format=torch.contiguous_format) for state in states]
