"""`generate()` as users call it, timed: until the first new token is there, and from there to the last."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.benchmarking.race import SETTLE_SECONDS
from lobcq_fx.errors import LobcqError

WARM_PROMPT, WARM_STEPS = 8, 2
"""Tokens of the untimed call before a timed one: it wakes the threads and warms the code."""


class OtherTokensError(LobcqError):
    """A model chose other tokens than before, from the same prompt: it gets no speed."""


@dataclass(frozen=True)
class Generated:
    """New tokens, int64 [B, S], the seconds until the first of each row was there, and from then until the last was."""

    tokens: Tensor
    first_seconds: float
    rest_seconds: float

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.first_seconds + self.rest_seconds


class _Times:
    """What transformers calls a streamer: `generate()` shows it the prompt, then each token as soon as it is there."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, _value: Tensor) -> None:
        """Tokens have come."""
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        """There are no more."""


def generate(model: Any, ids: Tensor, steps: int, streamer: Any = None) -> Tensor:
    """The likeliest `steps` tokens behind ids [B, T], [B, steps], whether or not an end is among them."""
    tokens: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        streamer=streamer,
    )
    return tokens[:, ids.shape[1] :]


def timed_generate(model: Any, ids: Tensor, steps: int) -> Generated:
    """One call, behind a short one."""
    time.sleep(SETTLE_SECONDS)
    generate(model, ids[:, :WARM_PROMPT], WARM_STEPS)
    times = _Times()
    start = time.perf_counter()
    tokens = generate(model, ids, steps, times)
    return Generated(tokens, times.seen[1] - start, times.seen[-1] - times.seen[1])


def check_tokens(name: str, found: Tensor, expected: Tensor) -> None:
    """See that a model chose what it chose before, both [B, S].

    Raises:
        OtherTokensError: it did not.
    """
    if torch.equal(found, expected):
        return
    shared = min(found.shape[1], expected.shape[1])
    other = (found[:, :shared] != expected[:, :shared]).any(dim=0).nonzero()
    place = int(other[0]) if len(other) else shared
    raise OtherTokensError(
        f"{name}: from new token {place} on generate() chose others than in its first run, from the same prompt:"
        f" {found[:, place:].tolist()} instead of {expected[:, place:].tolist()}, so no speed for it. Remedy: a"
        " generation_config.json with nothing random in it; if there is nothing, please report this"
    )
