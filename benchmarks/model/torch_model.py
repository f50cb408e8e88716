"""torch's side of benchmarks/model/generation.py: float models and ours, each compiled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

import lobcq_fx
from benchmarks.model.folders import CONFIGS, TORCH_BF16, Folders
from lobcq_fx.frontends.output_types import CACHE_NAME


class TorchModel:
    """A causal language model, eager or compiled, called with a DynamicCache."""

    def __init__(self, model: nn.Module, compiled: bool = True) -> None:
        self.module, self.config = model, model.config
        self.call = torch.compile(model, fullgraph=True, dynamic=True) if compiled else model

    def prefill(self, ids: Tensor) -> tuple[Tensor, DynamicCache]:
        """Logits [B, V] of the last position of ids [B, T], and the cache."""
        return self.step(ids, DynamicCache(config=self.config))

    def step(self, ids: Tensor, cache: DynamicCache | None) -> tuple[Tensor, DynamicCache]:
        """The same after some cached tokens; the cache grows in place. None: a prompt, and the model's own cache."""
        out = self.call(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        return out.logits[:, -1], out[CACHE_NAME]

    def fork(self, cache: DynamicCache) -> DynamicCache:
        """A cache that can grow while this one stays: growing makes new tensors, so that none is copied here."""
        forked = copy.copy(cache)
        forked.layers = [copy.copy(layer) for layer in cache.layers]
        return forked


def load_torch_model(folders: Folders, name: str) -> Any:
    """The saved module, in eval mode."""
    if name in CONFIGS:
        return lobcq_fx.load(folders.of(name))
    dtype = torch.bfloat16 if name == TORCH_BF16 else torch.float32
    return LlamaForCausalLM.from_pretrained(folders.of(name), dtype=dtype).eval()
