"""Cache layers that a graph is traced with whose model slides a window.

How many positions they hold is a size of its own, apart from how many tokens came before the call, which the length of
the attention mask tells: one graph takes layers that keep what the window can still see, and whole ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, masking_utils
from transformers.cache_utils import Cache, DynamicLayer

from lobcq_fx.frontends.growing_cache import LENGTH, Windows

KEPT = 4
"""Positions in the example's windows: another number than any other size of it, whatever window the model has."""


class WindowedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, W, D] of the last W of `tokens` positions before the call; returns W + T ones.

    tokens: known within `sliding`; a size, which a layer may not hold when the trace has ended.
    """

    is_sliding = True

    tokens: Any = None

    @classmethod
    def of(cls, whole: DynamicLayer) -> WindowedLayer:
        """The last positions of a layer."""
        layer = cls()
        keys, values = (state[:, :, -KEPT:].clone() for state in (whole.keys, whole.values))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        return layer

    def get_seq_length(self) -> Any:
        """Tokens before the call."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys, and the position of the first."""
        length = self.keys.shape[LENGTH]
        return length + query_length, self.tokens - length


@contextmanager
def sliding(model: PreTrainedModel, cache: Cache, windows: Windows) -> Iterator[None]:
    """Within, the cache of an example keeps the last positions of the layers with windows, for a trace of the model.

    The model's forward tells those layers how many tokens came before the call, by its attention_mask [B, P + T]. And
    masks are made without a look at their sizes, which would be taken for a decision: a trace never leaves a mask out.
    """
    if not windows:
        yield
        return
    for place, (whole, window) in enumerate(zip(cache.layers, windows, strict=True)):
        if window is not None:
            cache.layers[place] = WindowedLayer.of(whole)
    original, skips = model.forward, masking_utils._ignore_causal_mask_sdpa

    @functools.wraps(original)
    def forward(*args: Any, **call: Any) -> Any:
        given = next(value for value in call.values() if isinstance(value, Cache))
        layers = [layer for layer in given.layers if isinstance(layer, WindowedLayer)]
        for layer in layers:
            layer.tokens = call["attention_mask"].shape[1] - call["input_ids"].shape[1]
        output = original(*args, **call)
        for layer in layers:
            del layer.tokens
        return output

    model.forward = forward  # `tracing` puts back what was there
    masking_utils._ignore_causal_mask_sdpa = lambda *_, **__: False
    try:
        yield
    finally:
        model.forward, masking_utils._ignore_causal_mask_sdpa = original, skips
