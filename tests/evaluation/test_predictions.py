from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lobcq_fx.evaluation import divergence, perplexity
from tests.evaluation.conftest import VOCABULARY, Uniform


class Watched(nn.Module):
    """Counts its logits that are still in memory, views of them included, when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[weakref.ref[torch.UntypedStorage]] = []
        self.held: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.held.append(sum(one() is not None for one in self.memory))
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        self.memory.append(weakref.ref(logits.untyped_storage()))
        return SimpleNamespace(logits=logits)


class Broken(nn.Module):
    """Predicts NaN after token 5."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[input_ids == 5] = torch.nan
        return SimpleNamespace(logits=logits)


def test_no_more_than_two_batches_of_logits_are_held(text: Tensor) -> None:
    for models in ([Watched()], [Watched(), Watched()]):
        measure = perplexity if len(models) == 1 else divergence
        measure(*models, text, window=16, stride=8, batch_size=2)
        for model in models:
            assert len(model.held) == 8
            assert max(model.held) <= 1  # and the ones that it is about to return


def test_nan_gives_no_figure(text: Tensor) -> None:
    ids = torch.cat((text, torch.tensor([5, 6])))
    with pytest.raises(ValueError, match="Broken predicts NaN"):
        perplexity(Broken(), ids, window=32, stride=16)
    with pytest.raises(ValueError, match="Broken predicts NaN"):
        divergence(Uniform(), Broken(), ids, window=32, stride=16)
