"""The cache that a graph for static caches is traced with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class InPlaceCache(Cache):  # type: ignore[misc]
    """Keys and values [B, H, C, D] of which every call overwrites those at `positions`, int64 [T].

    What transformers' StaticLayer does, with sizes taken from the tensors, so that they can stay dynamic, and with the
    positions computed once, outside the graph, instead of from a counter in each layer that the graph would advance.
    """

    def __init__(self, layers: list[CacheLayerMixin], positions: Tensor) -> None:
        super().__init__(layers=layers)
        self.positions = positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, T, D] in place; return the whole cache, whose unwritten rest the mask hides."""
        layer = self.layers[layer_idx]
        layer.keys.index_copy_(2, self.positions, key_states)
        layer.values.index_copy_(2, self.positions, value_states)
        return layer.keys, layer.values

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        """Tokens before this call, int64 []."""
        return self.positions[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length of the keys, and the position of the first."""
        return self.layers[layer_idx].keys.shape[2], 0
