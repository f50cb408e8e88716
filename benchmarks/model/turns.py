"""What a contender of benchmarks/model/generation.py does in a turn: a prompt, or steps behind one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.model.llama_cpp.client import LlamaCppModel
from lobcq_fx.benchmarking.race import timed_turn

Turn = Callable[[], float]
"""Seconds of a prompt, or of a step."""


@dataclass
class Generation:
    """Greedy decoding from one prompt, again and again. token: the first new one of each row, [B, 1]."""

    model: Any
    token: Tensor
    start: Any
    cache: Any = None
    next: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rewind()

    def rewind(self) -> None:
        """Back to the prompt."""
        self.cache, self.next = self.model.fork(self.start), self.token

    def step(self) -> None:
        """One token."""
        logits, self.cache = self.model.step(self.next, self.cache)
        self.next = logits.argmax(dim=-1, keepdim=True)

    def last_step(self) -> None:
        """One token; the next step starts from the prompt."""
        self.step()
        self.rewind()


def prefill_turn(model: Any, ids: Tensor) -> Turn:
    """Read ids [1, T]."""
    if isinstance(model, LlamaCppModel):
        return partial(model.prefill_seconds, ids)
    return partial(timed_turn, [partial(model.prefill, ids)])


def decode_turn(model: Any, ids: Tensor, steps: int) -> Turn:
    """Steps behind ids [B, T], from the same place each time. Whatever compiles for a second step has compiled."""
    if isinstance(model, LlamaCppModel):
        return partial(model.decode_seconds, ids, steps)
    logits, cache = model.prefill(ids)
    generation = Generation(model, logits.argmax(dim=-1, keepdim=True), cache)
    generation.step()
    generation.last_step()
    return partial(timed_turn, [generation.step] * (steps - 1) + [generation.last_step])
