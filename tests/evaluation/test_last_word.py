from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lobcq_fx.evaluation import last_word
from tests.evaluation.conftest import Uniform

TEXTS = [
    "while True:\n    if not line:\n        break\n    if line is None:",
    "try:\n    pass\nexcept ValueError as error:\n    raise TypeError(str(error)) from None",
    "class Reader:\n    def read(self, something) -> kangaroo",
    "def __init__(self, name):\n        self.name = self.name",
    "with open(path) as file:",
]


@torch.no_grad()
def greedily(model: nn.Module, tokenizer: Any, text: str) -> tuple[bool, float]:
    """Whether generate() writes the last word, and its log-probability, from the model's own loss."""
    before = tokenizer(text[: text.rindex(" ")], return_tensors="pt")["input_ids"]
    whole = tokenizer(text, return_tensors="pt")["input_ids"]
    new = whole.shape[1] - before.shape[1]
    written = model.generate(input_ids=before, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    labels = whole.clone()
    labels[:, : before.shape[1]] = -100
    return torch.equal(written, whole), -new * float(model(input_ids=whole, labels=labels).loss)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_generate_and_the_models_loss(embedded: tuple[nn.Module, Any], batch_size: int) -> None:
    model, tokenizer = embedded
    found = last_word(model, tokenizer, TEXTS, batch_size=batch_size)
    expected = [greedily(model, tokenizer, text) for text in TEXTS]
    right = sum(same for same, _ in expected)
    assert 0 < right < len(TEXTS)
    assert found.acc == right / len(TEXTS)
    assert found.perplexity == pytest.approx(math.exp(-sum(value for _, value in expected) / len(TEXTS)), rel=1e-4)
    assert found.texts == len(TEXTS)


def test_a_words_tokens_count_as_one_word(embedded: tuple[nn.Module, Any]) -> None:
    _, tokenizer = embedded
    count = len(tokenizer("a kangaroo")["input_ids"]) - len(tokenizer("a")["input_ids"])
    assert count > 1
    found = last_word(Uniform(len(tokenizer)), tokenizer, ["a kangaroo"])
    assert found.perplexity == pytest.approx(len(tokenizer) ** count, rel=1e-4)


def test_what_has_no_last_word(embedded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = embedded
    with pytest.raises(ValueError, match="no texts"):
        last_word(model, tokenizer, [])
    for text in ("word", "word ", " word"):
        with pytest.raises(ValueError, match="no last word"):
            last_word(model, tokenizer, [text])
