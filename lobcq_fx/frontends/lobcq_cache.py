"""A cache of keys and values in LO-BCQ, for `past_key_values` of quantized and of float language models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import lobcq_fx.ops  # noqa: F401  (defines the ops called here)
from lobcq_fx.cache_format import CacheFormat
from lobcq_fx.config import check_attention, format_of
from lobcq_fx.errors import CallError
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.format.state_rows import StateRows
from lobcq_fx.frontends.growing_cache import LENGTH, Windows, check_windows, keep_window
from lobcq_fx.kernels.bind import bind_cpu_core

lobcq = torch.ops.lobcq


class LobcqLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, each uint8 [B, P, row_bytes]: a row is a token in all heads (`StateRows`).

    Cropping, reordering and repeating work on rows as they do on float states: tokens are the last dimension but one.
    """

    def __init__(self, cache_format: CacheFormat) -> None:
        super().__init__()
        self.format = cache_format

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """No tokens yet, on the device of [B, H, T, D] states."""
        self.device = key_states.device
        self.keys, self.values = (
            state.new_empty((state.shape[0], 0, self._layout(state).row_bytes), dtype=torch.uint8)
            for state in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states [B, H, T, D] of a float model's call; return all, [B, H, P + T, D], as they decode."""
        if self.format.attention != "w4a16":
            raise CallError(
                f"past_key_values is LobcqCache(attention={self.format.attention!r}), and this model's own attention"
                " multiplies floats: leave attention out, or pass the cache to a model from lobcq_fx.quantize()"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rotations = None
        if self.format.rotate_keys:
            width = key_states.shape[3]
            rotations = [self.format.rotation(width, operand).to(key_states) for operand in ("weight", "activation")]
        self.keys, keys = self._appended(self.keys, key_states if rotations is None else key_states @ rotations[0])
        self.values, values = self._appended(self.values, value_states)
        return keys if rotations is None else keys @ rotations[1], values

    def _appended(self, rows: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The grown rows, and what they decode to."""
        _, heads, _, width = states.shape
        spec = self._layout(states).spec
        codebooks = universal_codebooks(spec.num_codebooks).to(states.device)
        new = lobcq.quantize_states(states.detach(), codebooks, spec.array_size)
        rows = torch.cat((rows, new), dim=1)
        decoded = lobcq.dequantize_states(rows, codebooks, heads, width, spec.array_size, states.dtype)
        return rows, decoded

    def _layout(self, states: Tensor) -> StateRows:
        return self.format.rows(states.shape[1], states.shape[3])


class LobcqSlidingWindowLayer(LobcqLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The rows of the last window - 1 tokens, which are all that the next one can see beside itself."""

    def __init__(self, cache_format: CacheFormat, sliding_window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self.format = cache_format

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See the base class; what is returned is of the tokens that the call's first one may see, and of its own."""
        states = super().update(key_states, value_states)
        query = key_states.shape[LENGTH]
        self.keys, self.values = keep_window(self, (self.keys, self.values), query)
        visible = self.sliding_window - 1 + query
        keys, values = (state[:, :, -visible:] for state in states)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """As of floats, which have a dimension more."""
        if self.is_initialized:
            self.keys, self.values = self.keys[:, None], self.values[:, None]
        DynamicSlidingWindowLayer.crop(self, tokens_to_remove)
        if self.is_initialized:
            self.keys, self.values = self.keys[:, 0], self.values[:, 0]


class LobcqCache(Cache):  # type: ignore[misc]
    """Keys and values in LO-BCQ with universal codebooks: in the default format 4.5 bits a scalar, and 32 a token.

    It grows as a DynamicCache does, and is passed like one: `q.generate(..., past_key_values=LobcqCache())`. Each head
    of a token is encoded by itself along its width, with one tensor scale for all heads of the token. Attention reads
    what is cached, the call's own tokens included, and decodes one layer at a time.

    Args:
        format: a `FormatSpec` or its name; heads whose width its arrays do not divide get the shorter ones that store
            them in the fewest bytes.
        rotate_keys: multiply keys with a Hadamard matrix within their heads before they are encoded, which spreads the
            few columns that stand out in keys (docs/accuracy.md has what it is worth).
        attention: how quantized models multiply keys and values: `"w4a16"` in fp32, `"w4a8"` in integers, with queries
            and weights of tokens in int8.
        config: of the model, as for a DynamicCache: layers that slide a window keep what it can still see. Without, all
            layers are whole, and the model's mask applies the window.

    Raises:
        ConfigError: no such format, or no such way.
    """

    layers: list[Any]

    def __init__(
        self,
        format: FormatSpec | str = "8x64",
        *,
        rotate_keys: bool = True,
        attention: str = "w4a16",
        config: PreTrainedConfig | None = None,
    ) -> None:
        bind_cpu_core()
        check_attention(attention)
        self.format = CacheFormat(format_of(format), rotate_keys, attention)
        layers = [] if config is None else [self._layer(one) for one in DynamicCache(config=config).layers]
        if layers:
            super().__init__(layers=layers)
        else:
            super().__init__(layer_class_to_replicate=partial(LobcqLayer, self.format))

    def _layer(self, of_floats: Any) -> LobcqLayer:
        if isinstance(of_floats, DynamicSlidingWindowLayer):
            return LobcqSlidingWindowLayer(self.format, of_floats.sliding_window)
        return LobcqLayer(self.format)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)

    def rows(self, row_bytes: tuple[int, ...], windows: Windows, batch: int, device: torch.device) -> list[Tensor]:
        """Keys and values of every layer in turn, for a quantized model's graph; empty ones where there are none yet.

        Args:
            row_bytes: of a token's keys, then values, in every layer of the model.
            windows: of those that slide one, where the graph takes such.
            batch: of the call.
            device: of the call.

        Raises:
            CallError: the cache holds tokens of another model, batch or device.
        """
        if windows and self.layers:
            check_windows(self, windows)
        if self.get_seq_length() == 0:
            return [torch.empty((batch, 0, width), dtype=torch.uint8, device=device) for width in row_bytes]
        states = [state for layer in self.layers for state in (layer.keys, layer.values)]
        tokens = self.get_seq_length()
        slid = next(
            (layer.keys.shape[LENGTH] for layer, window in zip(self.layers, windows, strict=False) if window), tokens
        )
        lengths = [slid if window else tokens for window in windows] or [tokens] * len(row_bytes)
        wanted = [(batch, lengths[place // 2], width) for place, width in enumerate(row_bytes)]
        if [tuple(state.shape) for state in states] != wanted or states[0].device != device:
            raise CallError(
                f"past_key_values holds {len(self.layers)} layers of {list(states[0].shape)} on {states[0].device}, the"
                f" call needs {len(row_bytes) // 2} of {list(wanted[0])} [batch, tokens, bytes] on {device}: pass a new"
                " LobcqCache, or the one of this batch"
            )
        return states

    def grow(self, rows: list[Tensor], windows: Windows, query: int) -> None:
        """Take what a graph has made of `rows` in a call of `query` tokens."""
        layers = []
        for place, (keys, values) in enumerate(zip(rows[0::2], rows[1::2], strict=True)):
            layer = self.layers[place] if windows and place < len(self.layers) else None
            if isinstance(layer, LobcqSlidingWindowLayer):
                keys, values = keep_window(layer, (keys, values), query)
            else:
                layer = LobcqLayer(self.format)
            layer.keys, layer.values, layer.device = keys, values, keys.device
            layer.is_initialized = True
            layers.append(layer)
        self.layers = layers
