"""A part of many modules, in a process of its own."""

from __future__ import annotations

import logging
from collections import Counter

import torch

from tests.differential.compare import DifferentError, compare


def prepare() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def run(seeds: range) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        try:
            counts += compare(seed)
        except Exception as error:
            kind = "different modules" if isinstance(error, DifferentError) else "broken modules"
            counts += Counter({"modules": 1, kind: 1})
            failures.append(f"seed {seed}: {type(error).__name__}: {error}")
    torch._dynamo.reset()
    return counts, failures
