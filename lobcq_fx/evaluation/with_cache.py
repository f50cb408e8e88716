"""A language model that is called with a quantized cache, so that what such a cache costs can be measured."""

from __future__ import annotations

from typing import Any

from torch import nn

from lobcq_fx.frontends.lobcq_cache import LobcqCache


class WithLobcqCache(nn.Module):
    """A float or quantized causal language model; every call has a new `LobcqCache`, which its attention reads.

    model: the model. cache: arguments of `LobcqCache`.
    """

    def __init__(self, model: nn.Module, **cache: Any) -> None:
        super().__init__()
        LobcqCache(**cache)  # a bad argument is refused here
        self.model, self.cache = model, cache

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model, which must not be given a cache of its own."""
        return self.model(*args, **kwargs, past_key_values=LobcqCache(**self.cache), use_cache=True)
