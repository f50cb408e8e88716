"""A cache of keys and values in LO-BCQ, in memory of a fixed size, for `past_key_values` of quantized models."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from lobcq_fx.cache_format import CacheFormat
from lobcq_fx.config import check_attention, format_of
from lobcq_fx.errors import CallError
from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.bind import bind_cpu_core


class LobcqStaticLayer(StaticLayer):  # type: ignore[misc]
    """Keys and values of one layer, each uint8 [B, C, row_bytes]: a row is a token in all heads (`StateRows`)."""

    def __init__(self, max_cache_len: int, cache_format: CacheFormat) -> None:
        super().__init__(max_cache_len)
        self.format = cache_format

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for the states [B, H, T, D] of a call: rows of zeros, which decode to zeros."""
        super().lazy_initialization(*(self._rows_like(state) for state in (key_states, value_states)))
        for name in ("keys", "values"):
            rows = getattr(self, name)[:, 0]
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(rows)
            setattr(self, name, rows)

    def _rows_like(self, state: Tensor) -> Tensor:
        """No rows, as states of one head that is as wide as a row has bytes."""
        row_bytes = self.format.rows(state.shape[1], state.shape[3]).row_bytes
        return state.new_empty((state.shape[0], 1, 0, row_bytes), dtype=torch.uint8)

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse the states of a float model, which reads floats."""
        raise CallError(
            "past_key_values is a LobcqStaticCache, which models from lobcq_fx.quantize() write to: pass a LobcqCache,"
            " which grows and serves float models too"
        )


class LobcqStaticCache(Cache):  # type: ignore[misc]
    """As `LobcqCache`, of a fixed length: calls write their tokens in place, and nothing moves from step to step.

    Attention over it gives what it gives over a cache that grows, bit for bit, where neither is compiled.

    Args:
        layers: of the model.
        max_cache_len: how many tokens it has room for.
        format, rotate_keys, attention: as for `LobcqCache`.

    Raises:
        ConfigError: no such format, or no such attention.
    """

    def __init__(
        self,
        layers: int,
        max_cache_len: int,
        format: FormatSpec | str = "8x64",
        *,
        rotate_keys: bool = True,
        attention: str = "w4a16",
    ) -> None:
        bind_cpu_core()
        check_attention(attention)
        self.format = CacheFormat(format_of(format), rotate_keys, attention)
        super().__init__(layers=[LobcqStaticLayer(max_cache_len, self.format) for _ in range(layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, the room that is left included; 0 before the first call."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)
