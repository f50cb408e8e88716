from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lobcq_fx.evaluation import MultipleChoiceResult, Question, multiple_choice, same_choices
from lobcq_fx.evaluation.continuations import continuation_window
from tests.evaluation.conftest import Uniform

QUESTIONS = [
    Question("def read(path):\n    with open(path) as", ("file:\n        return", "banana", "f:"), 2),
    Question("import os\nimport", ("sys", "self.assertEqual(first, second)", "return None"), 0),
    Question("class Reader(object):\n    def", ("__init__(self):", "0.5", "import"), 1),
    Question("for index in range(", ("10):", "while"), 0),
]


@torch.no_grad()
def by_hand(model: nn.Module, tokenizer: Any, context: str, choice: str) -> float:
    """log p(choice | context), one call, one token after the other; the tokenizer begins both texts as it does."""
    before = tokenizer(context)["input_ids"]
    whole = tokenizer(f"{context} {choice}")["input_ids"]
    logits = model(input_ids=torch.tensor([whole])).logits[0].double()
    return sum(float(logits[place - 1].log_softmax(-1)[whole[place]]) for place in range(len(before), len(whole)))


def test_equals_log_likelihoods_by_hand(embedded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = embedded
    right, right_by_length, chosen = 0, 0, []
    for one in QUESTIONS:
        values = [by_hand(model, tokenizer, one.context, choice) for choice in one.choices]
        lengths = [len(choice) for choice in one.choices]
        normalised = [value / n for value, n in zip(values, lengths, strict=True)]
        chosen.append(values.index(max(values)))
        right += values.index(max(values)) == one.answer
        right_by_length += normalised.index(max(normalised)) == one.answer
    found = multiple_choice(model, tokenizer, QUESTIONS, batch_size=5)
    assert (found.acc, found.acc_norm, found.questions) == (right / 4, right_by_length / 4, 4)
    assert list(found.chosen) == chosen
    assert 0 < right < 4
    assert right != right_by_length
    deviation = [1.0] * right + [0.0] * (4 - right)
    assert found.acc_stderr == pytest.approx(float(torch.tensor(deviation).std()) / 2)


def test_a_model_that_knows_nothing_takes_the_shortest(embedded: tuple[nn.Module, Any]) -> None:
    """Uniform: log-likelihood is tokens times a constant, so that hand and eye suffice."""
    _, tokenizer = embedded
    tokens = {word: len(tokenizer(f" {word}")["input_ids"]) for word in ("return", "x", "qqqqqqqqq")}
    assert tokens["return"] <= tokens["x"] < tokens["qqqqqqqqq"]
    model = Uniform(len(tokenizer))
    asked = [Question("x =", ("qqqqqqqqq", "x", "return"), 1), Question("x =", ("qqqqqqqqq", "x", "return"), 2)]
    found = multiple_choice(model, tokenizer, asked)
    assert found.acc == 0.5  # of the two that are equally likely the first
    assert found.acc_norm == 0.5  # and per character the longer one
    assert math.isnan(multiple_choice(model, tokenizer, asked[:1]).acc_stderr)


def test_two_models_choose_the_same_or_not() -> None:
    one, other = (
        MultipleChoiceResult(0.5, 0.1, 0.5, 0.1, chosen, (0, 0, 0, 0)) for chosen in ((0, 1, 2, 0), (0, 2, 2, 0))
    )
    assert same_choices(one, other) == 0.75
    with pytest.raises(ValueError, match="4 and 1 questions"):
        same_choices(one, MultipleChoiceResult(0, 0, 0, 0, (0,), (0,)))


def test_a_context_that_is_too_long_loses_its_start(embedded: tuple[nn.Module, Any]) -> None:
    _, tokenizer = embedded
    context = "import os\n" * 30 + "for index in"
    window = continuation_window(tokenizer, context, " range(10):", 12)
    scored = len(tokenizer(context + " range(10):")["input_ids"]) - len(tokenizer(context)["input_ids"])
    assert (len(window.tokens), window.scored) == (13, scored)  # the last token is not fed
    short = tokenizer.decode(window.tokens[: -window.scored])
    assert context.endswith(short)


def test_spaces_at_the_end_of_a_context_go_to_the_choice(embedded: tuple[nn.Module, Any]) -> None:
    _, tokenizer = embedded
    one, other = (continuation_window(tokenizer, *pair, None) for pair in (("x = ", "y"), ("x =", " y")))
    assert torch.equal(one.tokens, other.tokens)
    assert one.scored == other.scored


def test_what_cannot_be_asked(embedded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = embedded
    with pytest.raises(ValueError, match="no questions"):
        multiple_choice(model, tokenizer, [])
    with pytest.raises(ValueError, match="the model takes 4"):
        multiple_choice(model, tokenizer, [Question("x", ("y " * 40, "z"), 0)], max_length=4)
    with pytest.raises(ValueError, match="no tokens are the latter's alone"):
        continuation_window(tokenizer, "def", "", None)
