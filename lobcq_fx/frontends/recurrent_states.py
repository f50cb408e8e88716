"""What a layer keeps from call to call: keys and values, states of a fixed size, or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from lobcq_fx.errors import CallError, TraceError
from lobcq_fx.tracing.example import LARGEST_SIZE

STATE_DTYPES = ("float32", "bfloat16", "float16")

DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)
"""Of layers that keep nothing; None in transformers 5.17."""

STATES_ARE_SERVED = DummyLayer is not None and hasattr(Cache, "get_recurrent_state")
"""Whether models ask their cache for states, as they do not in transformers 5.17."""

_WITH_STATES = (DummyLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)
KNOWN: tuple[type, ...] = (DynamicLayer, DynamicSlidingWindowLayer, *(_WITH_STATES if STATES_ARE_SERVED else ()))
"""Layers of transformers' caches that are understood. Beside states a window is kept whole, and the mask applies it."""


@dataclass(frozen=True)
class FixedState:
    """A state that every call replaces by one of the same size. shape: without the batch. dtype: such as "float32"."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, state: Tensor | None) -> FixedState | None:
        """Of a state [B, ...] that a float model has left; None where it has none."""
        return None if state is None else cls(tuple(state.shape[1:]), str(state.dtype).removeprefix("torch."))

    def zeros(self, batch: int, device: torch.device) -> Tensor:
        """What no tokens leave."""
        return torch.zeros((batch, *self.shape), dtype=getattr(torch, self.dtype), device=device)


@dataclass(frozen=True)
class LayerStates:
    """One layer's.

    attends: whether it keeps keys and values.
    conv, recurrent: the last inputs of its convolutions, and what its recurrences have added up, by their place; None
        where there is no such state.
    """

    attends: bool
    conv: tuple[FixedState | None, ...] = ()
    recurrent: tuple[FixedState | None, ...] = ()

    @classmethod
    def of(cls, layer: Any) -> LayerStates:
        """Of a layer that a float model has filled.

        Raises:
            TraceError: it is of a kind that is not known, or holds something else than it says.
        """
        if type(layer) not in KNOWN:
            raise TraceError(f"it keeps a {type(layer).__name__} in its cache")
        attends = isinstance(layer, DynamicLayer)
        if attends and (layer.keys is None or layer.keys.dim() != 4):
            raise TraceError("it does not cache plain keys and values [B, H, T, D] where it attends")
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            return cls(attends)
        conv, recurrent = (
            tuple(FixedState.of(states[place]) for place in range(layer.number_of_states))
            for states in (layer.conv_states, layer.recurrent_states)
        )
        return cls(attends, conv, recurrent)

    @property
    def fixed(self) -> tuple[FixedState, ...]:
        """The states of a fixed size, in the order of the graph."""
        return tuple(state for state in (*self.conv, *self.recurrent) if state is not None)

    def tensors_of(self, layer: Any) -> list[Tensor]:
        """The same of a layer that holds tokens, as tensors."""
        if not self.fixed:
            return []
        return [
            states[place]
            for kinds, states in ((self.conv, layer.conv_states), (self.recurrent, layer.recurrent_states))
            for place, kind in enumerate(kinds)
            if kind is not None
        ]

    def check_kind(self, layer: Any) -> None:
        """That a caller's layer is one that holds these states.

        Raises:
            CallError: says what it is, and what to pass.
        """
        kind, remedy = type(layer).__name__, "pass DynamicCache(config=model.config), new or as a call returned it"
        known = type(layer) in KNOWN and isinstance(layer, DynamicLayer) == self.attends
        if not known or isinstance(layer, LinearAttentionCacheLayerMixin) != bool(self.conv):
            raise CallError(f"the cache holds a {kind} where the model keeps {self.describe()}: {remedy}")
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() > 0:
            raise CallError(f"the cache holds tokens in a {kind}; the graph grows whole layers: {remedy}")
        if getattr(layer, "record_past", False):
            raise CallError(
                "the cache records its past so that it can be cropped, which states of a fixed size cannot be (assisted"
                f" decoding asks for it): {remedy}"
            )

    def describe(self) -> str:
        """For errors."""
        kept = [*(["keys and values"] if self.attends else []), *(["states of a fixed size"] if self.fixed else [])]
        return " and ".join(kept) or "nothing"

    def layer(
        self,
        keys: Tensor | None,
        values: Tensor | None,
        states: Iterator[Tensor],
        linear: type[LinearAttentionLayer] = LinearAttentionLayer,
        hybrid: type[LinearAttentionAndFullAttentionLayer] = LinearAttentionAndFullAttentionLayer,
    ) -> Any:
        """A layer that holds these; `states` are taken from an iterator over those of all layers."""
        if not self.attends and not self.conv:
            return DummyLayer()
        if not self.conv:
            layer = DynamicLayer()
        else:
            layer = (hybrid if self.attends else linear)(number_of_states=len(self.conv))
            for place, kind in enumerate(self.conv):
                if kind is not None:
                    conv = layer.conv_states[place] = next(states)
                    layer.device, layer.dtype, layer.conv_kernel_size[place] = conv.device, conv.dtype, conv.shape[-1]
                layer.is_conv_states_initialized[place] = kind is not None
                layer.has_previous_state[place] = True
            for place, kind in enumerate(self.recurrent):
                if kind is not None:
                    layer.recurrent_states[place] = next(states)
                layer.is_recurrent_states_initialized[place] = kind is not None
        if self.attends:
            assert keys is not None
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.device, layer.dtype = keys.device, keys.dtype
        return layer

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerStates:
        """Inverse of `dataclasses.asdict`.

        Raises:
            KeyError, TypeError, ValueError: it is damaged, or transformers too old.
        """
        if not STATES_ARE_SERVED:
            raise ValueError("this release of transformers has no layers for its states: update it, to 5.23 or later")
        conv, recurrent = (
            tuple(None if state is None else _fixed(state) for state in values[name]) for name in ("conv", "recurrent")
        )
        if len(conv) != len(recurrent) or type(values["attends"]) is not bool:
            raise ValueError(f"a layer's states are {values!r}, which fit no layer")
        return cls(values["attends"], conv, recurrent)


def holds_tokens(layer: Any) -> bool:
    """Whether a caller's layer has states of earlier calls."""
    if isinstance(layer, DynamicLayer) and layer.get_seq_length() > 0:
        return True
    return isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values())


def _fixed(values: Mapping[str, Any]) -> FixedState:
    shape, dtype = tuple(values["shape"]), values["dtype"]
    if dtype not in STATE_DTYPES or not shape or any(type(n) is not int or not 0 < n < LARGEST_SIZE for n in shape):
        raise ValueError(f"a state is {shape} in {dtype!r}, which none is")
    return FixedState(shape, dtype)
