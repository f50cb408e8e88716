"""Small language models, and the embedded one with its tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lobcq_fx

VOCABULARY = 97


class Uniform(nn.Module):
    """Gives every token the same probability."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocabulary))


def small_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return small_llama(0)


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(VOCABULARY, (131,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def embedded() -> tuple[nn.Module, Any]:
    """The embedded model in fp32, which nothing changes, and its tokenizer."""
    folder = lobcq_fx.default_model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)
