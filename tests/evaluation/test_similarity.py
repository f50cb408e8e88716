from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lobcq_fx.evaluation import cosine_similarity, mean_pooled, sentence_embeddings

WORDS = ["[PAD]", "[UNK]", "a", "cat", "sat", "on", "the", "mat", "dog", "ran"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(WORDS)
    )
    return BertModel(config).eval()


def test_the_mean_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[1.0, 1.0], [1.0, 1.0], [4.0, 1.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    torch.testing.assert_close(mean_pooled(hidden, mask), torch.tensor([[2.0, 4.0], [2.0, 1.0]]))


def test_embeddings_equal_each_sentence_on_its_own(bert: BertModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sentences = ["a cat sat on the mat", "dog", "the dog ran", "the cat ran on a mat on a mat on a mat"]
    seen: list[tuple[str, int, int]] = []
    found = sentence_embeddings(
        bert, tokenizer, sentences, batch_size=3, max_length=8, progress=lambda *step: seen.append(step)
    )
    assert seen == [("embed", 3, 4), ("embed", 4, 4)]
    for sentence, row in zip(sentences, found, strict=True):
        ids = torch.tensor([[WORDS.index(word) for word in sentence.split()][:8]])
        with torch.no_grad():
            mean = bert(ids).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_cosine_against_known_angles() -> None:
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    other = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    result = cosine_similarity(one, other)
    assert result.mean_cosine == pytest.approx((1 + math.sqrt(0.5) - 1) / 3)
    assert result.min_cosine == pytest.approx(-1.0)
    assert result.sentences == 3


def test_what_cannot_be_compared_is_refused(bert: BertModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="shapes"):
        cosine_similarity(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="shapes"):
        cosine_similarity(torch.ones(0, 3), torch.ones(0, 3))
    with pytest.raises(ValueError, match="no sentences"):
        sentence_embeddings(bert, tokenizer, [])
