"""A part of many modules, in a process of its own."""

from __future__ import annotations

import logging
from collections import Counter

import torch

from tests.differential.compare import Compared, DifferentError, compare


def prepare() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def run(seeds: range) -> tuple[Compared, list[str]]:
    counts: Counter[str] = Counter()
    operators: set[str] = set()
    failures = []
    for seed in seeds:
        try:
            found = compare(seed)
            counts += found.counts
            operators |= found.operators
        except Exception as error:
            kind = "different modules" if isinstance(error, DifferentError) else "broken modules"
            counts += Counter({"modules": 1, kind: 1})
            failures.append(f"seed {seed}: {type(error).__name__}: {error}")
    torch._dynamo.reset()
    return Compared(counts, frozenset(operators)), failures
