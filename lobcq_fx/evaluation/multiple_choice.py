"""Multiple choice by log-likelihood, as lm-evaluation-harness scores ARC and HellaSwag: `acc` and `acc_norm`.

Rules: lm-evaluation-harness 0.4.13, output_type `multiple_choice`
(https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lobcq_fx.evaluation.continuations import continuation_window
from lobcq_fx.evaluation.predictions import Progress, log_likelihoods
from lobcq_fx.evaluation.shares import share

DELIMITER = " "
"""Between a context and a choice."""


@dataclass(frozen=True)
class Question:
    """A text, what may follow it, and which of these choices (from 0) is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class MultipleChoiceResult:
    """Shares of questions answered rightly, and their standard errors.

    acc: the choice of the greatest log-likelihood is taken. acc_norm: of the greatest log-likelihood per character.
    chosen, chosen_norm: what was taken for each question, from 0.
    """

    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    chosen: tuple[int, ...]
    chosen_norm: tuple[int, ...]

    @property
    def questions(self) -> int:
        """How many were asked."""
        return len(self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def multiple_choice(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> MultipleChoiceResult:
    """Which choice a causal LM finds likeliest after each question's context; of equal ones, the first.

    Args:
        model: as `perplexity` takes it.
        tokenizer: a Hugging Face tokenizer.
        questions: a choice follows its context after one space.
        max_length: tokens that the model takes; longer contexts lose their first ones.
        batch_size: choices in one call, padded to the longest.
        progress: called as ("choose", choices done, choices in all).

    Raises:
        ValueError: no questions, or a choice without tokens of its own or with too many.
    """
    if not questions:
        raise ValueError("no questions to ask")
    windows = [
        continuation_window(tokenizer, one.context, DELIMITER + choice, max_length)
        for one in questions
        for choice in one.choices
    ]
    found = iter(log_likelihoods(model, windows, batch_size=batch_size, step="choose", progress=progress))
    by_total, by_character = [], []
    for one in questions:
        totals = [next(found).total for _ in one.choices]
        by_total.append(_greatest(totals))
        by_character.append(_greatest([total / len(own) for total, own in zip(totals, one.choices, strict=True)]))
    acc, acc_norm = (
        share([choice == one.answer for choice, one in zip(chosen, questions, strict=True)])
        for chosen in (by_total, by_character)
    )
    return MultipleChoiceResult(
        acc.value, acc.stderr, acc_norm.value, acc_norm.stderr, tuple(by_total), tuple(by_character)
    )


def same_choices(one: MultipleChoiceResult, other: MultipleChoiceResult) -> float:
    """Share of questions for which two models took the same choice, right or wrong, of those behind `acc`.

    One minus it are the flips of Dutta et al., Accuracy Is Not All You Need, 2024.

    Raises:
        ValueError: the results are of different numbers of questions.
    """
    if one.questions != other.questions:
        raise ValueError(f"{one.questions} and {other.questions} questions: ask both models the same ones")
    return sum(a == b for a, b in zip(one.chosen, other.chosen, strict=True)) / one.questions


def _greatest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
