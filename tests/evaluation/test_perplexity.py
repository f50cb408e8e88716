from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lobcq_fx.evaluation import PerplexityResult, perplexity, perplexity_of_sequences
from tests.evaluation.conftest import VOCABULARY, Uniform


class Successor(nn.Module):
    """Expects token t + 1 after t, with logit 3 against 0 for each other token; records what it was given: no window's
    last token."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.calls.append(input_ids)
        return SimpleNamespace(logits=3.0 * nn.functional.one_hot((input_ids + 1) % VOCABULARY, VOCABULARY))


def hugging_face_loop(model: nn.Module, ids: Tensor, window: int, stride: int) -> tuple[float, int]:
    """The loop of https://huggingface.co/docs/transformers/perplexity, with sums in place of means of means."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        inputs = ids[begin:end][None]
        targets = inputs.clone()
        targets[:, : -(end - previous_end)] = -100
        scored = int((targets[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(inputs, labels=targets).loss) * scored if scored else 0.0
        count += scored
        previous_end = end
        if end == len(ids):
            break
    return total / count, count


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 31), (32, 32), (20, 1), (65, 65), (2, 1), (500, 100)])
def test_equals_the_loop_in_the_transformers_documentation(
    llama: LlamaForCausalLM, text: Tensor, window: int, stride: int, batch_size: int
) -> None:
    expected, count = hugging_face_loop(llama, text, window, stride)
    result = perplexity(llama, text, window=window, stride=stride, batch_size=batch_size)
    assert result.tokens == count
    assert result.negative_log_likelihood == pytest.approx(expected, rel=1e-5)
    assert (result.window, result.stride) == (window, stride)


def test_every_token_but_the_first_is_scored_once_with_enough_context() -> None:
    ids = torch.arange(50)
    model = Successor()
    result = perplexity(model, ids, window=16, stride=5)
    scored = [int(call[0, -1]) + 1 for call in model.calls]
    assert result.tokens == 49
    assert sorted(scored) == [15, 20, 25, 30, 35, 40, 45, 49]
    assert all(call.shape[1] < 16 for call in model.calls)


def test_closed_forms(text: Tensor) -> None:
    uniform = perplexity(Uniform(), text, window=16, stride=8)
    assert uniform.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    expected = 1 + (VOCABULARY - 1) * math.exp(-3.0)  # 1 / softmax of the favoured token
    right = perplexity(Successor(), torch.arange(60), window=16, stride=8).perplexity
    assert right == pytest.approx(expected, rel=1e-6)
    wrong = perplexity(Successor(), torch.zeros(60, dtype=torch.long), window=16, stride=8).perplexity
    assert wrong == pytest.approx(expected * math.exp(3.0), rel=1e-6)


def test_bos_comes_before_every_window_and_counts_against_it() -> None:
    model = Successor()
    result = perplexity(model, torch.arange(20), window=8, stride=7, bos_token_id=96)
    assert result.tokens == 20
    assert all(int(call[0, 0]) == 96 and call.shape[1] < 8 for call in model.calls)


def test_sequences_equal_one_call_each(llama: LlamaForCausalLM, text: Tensor) -> None:
    stories = [text[:30], text[30:37], text[40:41], text[50:80], text[80:131]]
    total, count = 0.0, 0
    for story in stories:
        ids = torch.cat((torch.tensor([1]), story))[:40]
        with torch.no_grad():
            log_probabilities = llama(ids[None]).logits[0, :-1].log_softmax(-1)
        total -= float(log_probabilities.gather(1, ids[1:, None]).sum())
        count += len(ids) - 1
    result = perplexity_of_sequences(llama, stories, max_length=40, bos_token_id=1, batch_size=2)
    assert result.tokens == count == 30 + 7 + 1 + 30 + 39
    assert result.stride is None
    assert result.negative_log_likelihood == pytest.approx(total / count, rel=1e-5)


def test_a_sequence_of_one_token_has_nothing_to_score_without_bos() -> None:
    result = perplexity_of_sequences(Uniform(), [[5], [5, 6, 7]], max_length=8)
    assert result.tokens == 2


def test_progress_counts_windows(text: Tensor) -> None:
    seen: list[tuple[str, int, int]] = []
    perplexity(Uniform(), text, window=32, stride=16, batch_size=2, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("perplexity", 8, 8)
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1, "stride": 1}, "window=1"),
        ({"window": 8, "stride": 0}, "stride=0"),
        ({"window": 8, "stride": 9}, "stride=9"),
        ({"window": 8, "stride": 8, "bos_token_id": 1}, "from 1 to 7"),
        ({"window": 8, "stride": 4, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_impossible_settings_are_refused(text: Tensor, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(Uniform(), text, **arguments)


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="too short"):
        perplexity(Uniform(), torch.tensor([3]), window=8, stride=4)
    with pytest.raises(ValueError, match="too short"):
        perplexity_of_sequences(Uniform(), [], max_length=8)
    with pytest.raises(ValueError, match="max_length=1"):
        perplexity_of_sequences(Uniform(), [[1, 2]], max_length=1)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert PerplexityResult(1e4, 10, 8, 4).perplexity == math.inf
