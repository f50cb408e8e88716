"""Tokens to feed a language model, and which of them it is to predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Tokens, int64 [T], of which the last `scored` are predicted from all that stands before them."""

    tokens: Tensor
    scored: int


def as_token_ids(given: Tensor | Sequence[int]) -> Tensor:
    """int64 [N] on the CPU, of int [N] or [1, N]."""
    return torch.as_tensor(given, dtype=torch.long, device="cpu").flatten()


def sliding_windows(
    token_ids: Tensor | Sequence[int], window: int, stride: int, bos_token_id: int | None = None
) -> list[Window]:
    """One long text, a window every `stride` tokens: each scores the tokens that no earlier window covered.

    Args:
        token_ids: int [N] or [1, N], the whole text.
        window: tokens of a window, `bos_token_id` included.
        stride: from 1 to the text's tokens in a window.
        bos_token_id: put before every window; then each window's first token is scored too.

    Raises:
        ValueError: an impossible window or stride, or fewer tokens than one prediction needs.
    """
    ids = as_token_ids(token_ids)
    room = window - (bos_token_id is not None)
    if window < 2:
        raise ValueError(f"window={window}: a prediction needs a window of at least 2 tokens")
    if not 1 <= stride <= room:
        raise ValueError(f"stride={stride}: choose one from 1 to {room}, the tokens of the text in one window")
    return _not_empty(list(_sliding(ids, room, stride, bos_token_id)))


def separate_windows(
    sequences: Sequence[Tensor | Sequence[int]], max_length: int, bos_token_id: int | None = None
) -> list[Window]:
    """Each sequence (int [N_i]) as one window of at most `max_length` tokens, `bos_token_id` before it included.

    Raises:
        ValueError: `max_length` below 2, or no sequence long enough for a prediction.
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: a prediction needs at least 2 tokens")
    whole = [_whole(as_token_ids(ids), bos_token_id) for ids in sequences]
    cut = [Window(one.tokens[:max_length], min(one.scored, max_length - 1)) for one in whole]
    return _not_empty([one for one in cut if one.scored > 0])


def _sliding(ids: Tensor, room: int, stride: int, bos_token_id: int | None) -> Iterator[Window]:
    covered = 0
    for start in range(0, ids.numel(), stride):
        stop = min(start + room, ids.numel())
        whole = _whole(ids[start:stop], bos_token_id)
        if (scored := min(stop - covered, whole.scored)) > 0:
            yield Window(whole.tokens, scored)
        covered = stop
        if stop == ids.numel():
            return


def _whole(ids: Tensor, bos_token_id: int | None) -> Window:
    tokens = ids if bos_token_id is None else torch.cat((as_token_ids([bos_token_id]), ids))
    return Window(tokens, max(0, tokens.numel() - 1))


def _not_empty(windows: list[Window]) -> list[Window]:
    if not windows:
        raise ValueError("the text is too short: a prediction needs at least 2 tokens")
    return windows
