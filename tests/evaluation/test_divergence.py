from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from lobcq_fx.evaluation import divergence, divergence_of_sequences, perplexity
from tests.evaluation.conftest import Uniform, small_llama


@pytest.fixture(scope="module")
def noisy(llama: LlamaForCausalLM) -> nn.Module:
    """The same model, its weights a little off."""
    model = small_llama(0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def direct(model: nn.Module, reference: nn.Module, windows: list[Tensor]) -> tuple[float, float, float, int]:
    """Loss of both by transformers, KL by torch in fp64, agreement: over whole windows, one call each."""
    losses, divergence, same, count = [0.0, 0.0], 0.0, 0, 0
    with torch.no_grad():
        for ids in windows:
            found = [one(input_ids=ids[None], labels=ids[None]) for one in (model, reference)]
            scored = len(ids) - 1
            losses = [total + scored * float(one.loss) for total, one in zip(losses, found, strict=True)]
            ours, theirs = (one.logits[0, :-1].double().log_softmax(-1) for one in found)
            divergence += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            count += scored
    return losses[0] / count, losses[1] / count, divergence / count, same


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_transformers_losses_and_torchs_kl_div(
    llama: LlamaForCausalLM, noisy: nn.Module, text: Tensor, batch_size: int
) -> None:
    found = divergence(noisy, llama, text, window=32, stride=32, batch_size=batch_size)
    own, their, expected, same = direct(noisy, llama, list(text.split(32)))
    assert found.model.tokens == found.reference.tokens == 131 - 5
    assert found.model.negative_log_likelihood == pytest.approx(own, rel=1e-6)
    assert found.reference.negative_log_likelihood == pytest.approx(their, rel=1e-6)
    assert found.kl_divergence == pytest.approx(expected, rel=1e-6)
    assert 0 < same < 126
    assert found.top1_agreement == pytest.approx(same / 126)


@torch.no_grad()
def test_of_overlapping_windows_the_last_tokens_count(llama: LlamaForCausalLM, noisy: nn.Module, text: Tensor) -> None:
    found = divergence(noisy, llama, text[:60], window=24, stride=8, batch_size=3)
    expected = []
    for start, context in ((0, 1), (8, 16), (16, 16), (24, 16), (32, 16), (40, 16)):
        ids = text[start : min(start + 24, 60)][None]
        ours, theirs = (one(input_ids=ids).logits[0, context - 1 : -1].double() for one in (noisy, llama))
        expected.append(F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1))
    assert found.model.tokens == 59 == len(torch.cat(expected))
    assert found.kl_divergence == pytest.approx(float(torch.cat(expected).mean()), rel=1e-6)
    again = perplexity(noisy, text[:60], window=24, stride=8)
    assert found.model.perplexity == pytest.approx(again.perplexity, rel=1e-6)


def test_closed_forms(text: Tensor) -> None:
    class Sharp(Uniform):
        """Half of all probability to token 0, none to token 1, the rest to the others alike."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
            found = super().forward(input_ids, attention_mask)
            found.logits[..., 0] = math.log(95)
            found.logits[..., 1] = -math.inf
            return found

    found = divergence(Uniform(), Sharp(), text[text > 1], window=16, stride=8)
    assert found.kl_divergence == pytest.approx(0.5 * math.log(0.5 * 97) + 0.5 * math.log(97 / 190), rel=1e-6)
    assert found.model.perplexity == pytest.approx(97)
    assert found.reference.perplexity == pytest.approx(190)
    assert found.perplexity_ratio == pytest.approx(97 / 190)
    assert found.top1_agreement == 1
    assert math.isinf(divergence(Sharp(), Uniform(), text, window=16, stride=8).kl_divergence)


def test_a_model_diverges_from_itself_by_nothing(llama: LlamaForCausalLM, text: Tensor) -> None:
    found = divergence(llama, llama, text, window=32, stride=16)
    assert (found.kl_divergence, found.top1_agreement, found.perplexity_ratio) == (0, 1, 1)


def test_sequences_weigh_by_their_tokens(llama: LlamaForCausalLM, noisy: nn.Module, text: Tensor) -> None:
    stories = [text[:30], text[30:37], text[50:80]]
    found = divergence_of_sequences(noisy, llama, stories, max_length=25, bos_token_id=1, batch_size=2)
    _, _, expected, _ = direct(noisy, llama, [torch.cat((torch.tensor([1]), one))[:25] for one in stories])
    assert found.model.tokens == 24 + 7 + 24
    assert found.kl_divergence == pytest.approx(expected, rel=1e-6)


def test_progress_and_what_cannot_be_compared(llama: LlamaForCausalLM, text: Tensor) -> None:
    seen: list[tuple[str, int, int]] = []
    divergence(Uniform(), Uniform(), text, window=32, stride=16, batch_size=3, progress=lambda *step: seen.append(step))
    assert seen == [("compare", 3, 8), ("compare", 6, 8), ("compare", 8, 8)]
    with pytest.raises(ValueError, match="98 and 97 tokens"):
        divergence(Uniform(98), llama, text, window=32, stride=16)
