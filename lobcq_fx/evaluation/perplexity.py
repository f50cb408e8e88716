"""Perplexity of causal language models, over one long text or over separate sequences.

Definition: https://huggingface.co/docs/transformers/perplexity (sliding window with a stride).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Progress = Callable[[str, int, int], None]
"""Called with (step, done, total)."""


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured, and over what.

    negative_log_likelihood: mean over the scored tokens, in nats.
    tokens: how many tokens were scored.
    window: tokens the model saw at once, at most. stride: tokens from one window to the next; None where every
        sequence is one window.
    """

    negative_log_likelihood: float
    tokens: int
    window: int
    stride: int | None

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-likelihood; infinity where that overflows."""
        try:
            return math.exp(self.negative_log_likelihood)
        except OverflowError:
            return math.inf

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"perplexity": self.perplexity, **asdict(self)}


@dataclass(frozen=True)
class _Window:
    """Tokens to feed, int64 [T], of which the last `scored` are predicted from all that stands before them."""

    tokens: Tensor
    scored: int


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
        window: tokens the model sees at once, `bos_token_id` included; at most its maximum length.
        stride: from 1 to the text's tokens in a window.
        batch_size: windows in one call.
        bos_token_id: put before every window; then each window's first token is scored too.
        progress: called as ("perplexity", windows done, windows in all).

    Raises:
        ValueError: an impossible window or stride, or fewer tokens than one prediction needs.
    """
    ids = _token_ids(token_ids)
    room = window - (bos_token_id is not None)
    if window < 2:
        raise ValueError(f"window={window}: a prediction needs a window of at least 2 tokens")
    if not 1 <= stride <= room:
        raise ValueError(f"stride={stride}: choose one from 1 to {room}, the tokens of the text in one window")
    windows = list(_sliding_windows(ids, room, stride, bos_token_id))
    return _score(model, windows, batch_size, window, stride, progress)


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
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: a prediction needs at least 2 tokens")
    windows = [_window(_token_ids(ids), bos_token_id) for ids in sequences]
    windows = [_Window(w.tokens[:max_length], min(w.scored, max_length - 1)) for w in windows]
    return _score(model, [w for w in windows if w.scored > 0], batch_size, max_length, None, progress)


def _sliding_windows(ids: Tensor, room: int, stride: int, bos_token_id: int | None) -> Iterator[_Window]:
    covered = 0
    for start in range(0, ids.numel(), stride):
        stop = min(start + room, ids.numel())
        whole = _window(ids[start:stop], bos_token_id)
        if (scored := min(stop - covered, whole.scored)) > 0:
            yield _Window(whole.tokens, scored)
        covered = stop
        if stop == ids.numel():
            return


def _token_ids(given: Tensor | Sequence[int]) -> Tensor:
    """int64 [N] on the CPU."""
    return torch.as_tensor(given, dtype=torch.long, device="cpu").flatten()


def _window(ids: Tensor, bos_token_id: int | None) -> _Window:
    tokens = ids if bos_token_id is None else torch.cat((_token_ids([bos_token_id]), ids))
    return _Window(tokens, max(0, tokens.numel() - 1))


def _score(
    model: nn.Module,
    windows: Sequence[_Window],
    batch_size: int,
    window: int,
    stride: int | None,
    progress: Progress | None,
) -> PerplexityResult:
    """Sum in fp64 over batches of windows of one length each, so that no batch needs padding."""
    if not windows:
        raise ValueError("the text is too short: a prediction needs at least 2 tokens")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: choose at least 1")
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    total, scored, done = 0.0, 0, 0
    by_length = sorted(windows, key=lambda one: one.tokens.numel())
    for _, group in groupby(by_length, key=lambda one: one.tokens.numel()):
        same_length = list(group)
        for first in range(0, len(same_length), batch_size):
            batch = same_length[first : first + batch_size]
            total += _negative_log_likelihood(model, batch, device)
            scored += sum(one.scored for one in batch)
            done += len(batch)
            if progress is not None:
                progress("perplexity", done, len(windows))
    return PerplexityResult(total / scored, scored, window, stride)


@torch.no_grad()
def _negative_log_likelihood(model: nn.Module, batch: Sequence[_Window], device: torch.device) -> float:
    input_ids = torch.stack([one.tokens for one in batch]).to(device)
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    total = 0.0
    for one, tokens, scores in zip(batch, input_ids, logits, strict=True):
        predictions = scores[-one.scored - 1 : -1].float()
        total += F.cross_entropy(predictions, tokens[-one.scored :], reduction="none").double().sum().item()
    return total
