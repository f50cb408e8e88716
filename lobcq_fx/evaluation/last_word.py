"""The last word of a text, as LAMBADA asks for it: is it what a model would write, and how surprising is it?

Source: Paperno et al., The LAMBADA dataset, 2016; rules: lm-evaluation-harness 0.4.13, task `lambada_openai`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lobcq_fx.evaluation.continuations import continuation_window
from lobcq_fx.evaluation.perplexity import exponential
from lobcq_fx.evaluation.predictions import Progress, log_likelihoods
from lobcq_fx.evaluation.shares import share


@dataclass(frozen=True)
class LastWordResult:
    """acc: share of texts whose last word is, token for token, the likeliest one. perplexity: e to the mean negative
    log-likelihood of a word, whatever its number of tokens."""

    acc: float
    acc_stderr: float
    perplexity: float
    texts: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def last_word(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> LastWordResult:
    """How a causal LM continues texts that lack their last word: what stands after the last space.

    Args:
        model: as `perplexity` takes it.
        tokenizer: a Hugging Face tokenizer.
        texts: of two words at least, without a space at the end.
        max_length: tokens that the model takes; longer texts lose their first ones.
        batch_size: texts in one call, padded to the longest.
        progress: called as ("last word", texts done, texts in all).

    Raises:
        ValueError: no texts, or one without a last word.
    """
    if not texts:
        raise ValueError("no texts whose last word could be asked for")
    windows = []
    for text in texts:
        context, _, word = text.rpartition(" ")
        if not context or not word:
            raise ValueError(f"{text[:40]!r} has no last word after others")
        windows.append(continuation_window(tokenizer, context, " " + word, max_length))
    found = log_likelihoods(model, windows, batch_size=batch_size, step="last word", progress=progress)
    acc = share([one.greedy for one in found])
    mean = sum(one.total for one in found) / len(found)
    return LastWordResult(acc.value, acc.stderr, exponential(-mean), len(texts))
