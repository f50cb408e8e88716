"""Attention of a float model whose queries, or weights of tokens, are rounded to LO-BCQ before they are multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lobcq_fx.cache_format import CacheFormat
from lobcq_fx.format import FormatSpec, universal_codebooks

NAME = "lobcq_rounded"
SPEC = FormatSpec()


@contextmanager
def rounded(model: nn.Module, what: tuple[str, ...]) -> Iterator[None]:
    """Let a model's attention round "queries", "weights" or both, as long as this is open.

    Queries are rotated within their heads first, as keys in a cache are. Weights are rounded along the tokens.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        groups, width = query.shape[1] // key.shape[1], query.shape[3]
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
        if "queries" in what:
            there, back = (CacheFormat(SPEC).rotation(width, one).to(query) for one in ("activation", "weight"))
            query = _rounded(query @ there) @ back
        scores = query @ key.mT * (width**-0.5 if scaling is None else scaling)
        if mask is None:
            queries, tokens = scores.shape[2:]
            mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return ((_rounded(weights) if "weights" in what else weights) @ value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    ALL_MASK_ATTENTION_FUNCTIONS[NAME] = sdpa_mask
    config: Any = model.config
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _rounded(x: Tensor) -> Tensor:
    """Each row by itself, by the ops that keys and values are encoded with."""
    rows, codebooks = x.reshape(1, 1, -1, x.shape[-1]), universal_codebooks(SPEC.num_codebooks)
    encoded = torch.ops.lobcq.quantize_states(rows, codebooks, SPEC.array_size)
    sizes = (1, x.shape[-1], SPEC.array_size, torch.float32)
    return torch.ops.lobcq.dequantize_states(encoded, codebooks, *sizes).view(x.shape)
