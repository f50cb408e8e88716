"""Perplexity of causal language models, over one long text or over separate sequences.

Definition: https://huggingface.co/docs/transformers/perplexity (sliding window with a stride).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lobcq_fx.evaluation.predictions import Progress, log_likelihoods
from lobcq_fx.evaluation.windows import Window, separate_windows, sliding_windows


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured, and over what.

    negative_log_likelihood: mean over the scored tokens, in nats.
    tokens: how many tokens were scored.
    window: tokens of a window, at most. stride: tokens from one window to the next; None where every sequence is one
        window.
    """

    negative_log_likelihood: float
    tokens: int
    window: int
    stride: int | None

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-likelihood; infinity where that overflows."""
        return exponential(self.negative_log_likelihood)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"perplexity": self.perplexity, **asdict(self)}


def exponential(nats: float) -> float:
    """e to that power; infinity where that overflows."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def perplexity(
    model: nn.Module,
    token_ids: Tensor | Sequence[int],
    *,
    window: int,
    stride: int,
    batch_size: int = 1,
    bos_token_id: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity over one long text, by a sliding window.

    A window starts every `stride` tokens and scores the tokens that no earlier window covered, so each token is scored
    once, with at least `window - stride` tokens before it (fewer at the start of the text). A window's first token has
    nothing before it and is not scored; that concerns the text's first token, and with `stride == window` (disjoint
    windows) one token a window.

    Args:
        model: a causal LM, float or quantized: called with input_ids and attention_mask [B, T], returns an object with
            logits [B, T, V].
        token_ids: int [N] or [1, N], the whole text.
        window: tokens of a window, `bos_token_id` included; at most the model's maximum length.
        stride: from 1 to the text's tokens in a window.
        batch_size: windows in one call.
        bos_token_id: put before every window; then each window's first token is scored too.
        progress: called as ("perplexity", windows done, windows in all).

    Raises:
        ValueError: an impossible window or stride, or fewer tokens than one prediction needs.
    """
    windows = sliding_windows(token_ids, window, stride, bos_token_id)
    return PerplexityResult(*_mean(model, windows, batch_size, progress), window, stride)


def perplexity_of_sequences(
    model: nn.Module,
    sequences: Sequence[Tensor | Sequence[int]],
    *,
    max_length: int,
    batch_size: int = 1,
    bos_token_id: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity over separate sequences (stories, documents): each is one window, and every token counts the same.

    Args:
        model: as for `perplexity`.
        sequences: int [N_i] each.
        max_length: tokens of a sequence that are used, `bos_token_id` included; the rest is dropped.
        batch_size: sequences in one call.
        bos_token_id: put before every sequence; without it a sequence's first token is not scored.
        progress: called as ("perplexity", sequences done, sequences in all).

    Raises:
        ValueError: `max_length` below 2, or no sequence long enough for a prediction.
    """
    windows = separate_windows(sequences, max_length, bos_token_id)
    return PerplexityResult(*_mean(model, windows, batch_size, progress), max_length, None)


def _mean(model: nn.Module, windows: Sequence[Window], batch_size: int, progress: Progress | None) -> tuple[float, int]:
    """Mean negative log-likelihood of the scored tokens, and how many they are."""
    found = log_likelihoods(model, windows, batch_size=batch_size, step="perplexity", progress=progress)
    scored = sum(one.scored for one in windows)
    return -sum(one.total for one in found) / scored, scored
