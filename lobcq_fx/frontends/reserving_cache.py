"""A growing cache that appends keys and values in place.

DynamicCache makes new tensors of all tokens at every step: a decode step of a long context spends more time on these
copies than on attention. Here memory is reserved ahead, half as much again as is needed, and a step writes its own
tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

LENGTH = 2
"""Dimension of the tokens in keys and values [B, H, P, D]."""

LEAST_SPARE = 256
"""Tokens that memory is reserved for at least, beyond those that are needed."""


@dataclass
class Reserved:
    """Memory for states [B, H, C, D], of which the first `filled` tokens are written, once and for all.

    Layers that are copies of one another share it: the first one to append goes on in it, and the others, whose tokens
    are no longer all that is filled, copy theirs.
    """

    memory: Tensor
    filled: int

    @classmethod
    def of(cls, states: Tensor, more: int) -> Reserved:
        """New memory that holds some states, with room for `more` tokens and some to spare."""
        batch, heads, filled, width = states.shape
        tokens = filled + more
        # Pages that nothing is written to take no memory.
        memory = states.new_empty((batch, heads, tokens + max(LEAST_SPARE, tokens // 2), width))
        memory[:, :, :filled] = states
        return cls(memory, filled)

    def continues(self, states: Tensor, more: int) -> bool:
        """Whether `states` are all that is filled, `more` tokens fit behind them, and may be written there."""
        if self.memory.is_inference() and not torch.is_inference_mode_enabled():
            return False
        batch, heads, _, width = self.memory.shape
        return (
            states.shape == (batch, heads, self.filled, width)
            and states.data_ptr() == self.memory.data_ptr()
            and self.filled + more <= self.memory.shape[LENGTH]
        )

    def first(self, tokens: int) -> Tensor:
        """A view of the first tokens."""
        return self.memory[:, :, :tokens]


class ReservingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, P, D] of one layer: views of memory with room for more tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._reserved: tuple[Reserved, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """No tokens yet, of the dtype, sizes and device of [B, H, T, D] states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (state[:, :, :0] for state in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states [B, H, T, D] of a call; return all, [B, H, P + T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        query = key_states.shape[LENGTH]
        for whole, new in zip(self.reserve(query), (key_states, value_states), strict=True):
            whole[:, :, -query:] = new
        self.advance(query)
        return self.keys, self.values

    def reserve(self, query: int) -> list[Tensor]:
        """Keys and values [B, H, P + T, D] whose last T = `query` tokens are to be written, before `advance`."""
        states = (self.keys, self.values)
        kept = zip(self._reserved, states, strict=False)
        if not self._reserved or not all(one.continues(state, query) for one, state in kept):
            self._reserved = tuple(Reserved.of(state, query) for state in states)
            self._view(self.keys.shape[LENGTH])
        return [one.first(one.filled + query) for one in self._reserved]

    def advance(self, query: int) -> None:
        """Count the tokens that were written to what `reserve` gave."""
        for one in self._reserved:
            one.filled += query
        self._view(self._reserved[0].filled)

    def _view(self, tokens: int) -> None:
        self.keys, self.values = (one.first(tokens) for one in self._reserved)

    def reset(self) -> None:
        """Forget all tokens, and the memory, which copies of this layer may go on in."""
        super().reset()
        self._reserved = ()


class ReservingCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache whose layers are all whole and append in place; what it holds and returns is the same.

    Cropping, reordering and repeating work as they do there, and make the next call copy what is left, as every call
    does there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = ReservingLayer


def appends_in_place(cache: Any) -> bool:
    """Whether a cache is such a one. While torch.compile traces, none is: compiled graphs make new tensors."""
    return (
        isinstance(cache, ReservingCache)
        and not torch.compiler.is_compiling()
        and all(type(layer) is ReservingLayer for layer in cache.layers)
    )


def reserve(cache: ReservingCache, shapes: Sequence[tuple[int, int, int]], query: int, like: Tensor) -> list[Tensor]:
    """Keys and values of every layer in turn, [B, H, P + T, D], for a call to write its T tokens to.

    Args:
        cache: it may be empty; otherwise of these shapes.
        shapes: of each layer, heads and the widths of a key and a value.
        query: T.
        like: a tensor [B] of the cache's dtype and device.
    """
    if not cache.layers:
        cache.layers.extend(ReservingLayer() for _ in shapes)
    for layer, (heads, *widths) in zip(cache.layers, shapes, strict=True):
        if not layer.is_initialized:
            layer.lazy_initialization(*(like.new_empty((like.shape[0], heads, 0, width)) for width in widths))
    return [state for layer in cache.layers for state in layer.reserve(query)]
