"""The whole measurement, as JSON-ready values: what `lobcq bench` and benchmarks/cpu/linears.py share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lobcq_fx.benchmarking.comparison import Comparison, Plan, shape_name
from lobcq_fx.benchmarking.machine import machine

Progress = Callable[[str, int, int | None], None]


def measure(shapes: Sequence[tuple[int, int]], plan: Plan, progress: Progress) -> dict[str, Any]:
    """Compare on each shape N, K.

    Args:
        progress: called as `progress("measure", races done, races)`.

    Returns:
        "machine"; "mode", "threads", "rounds" of the plan; "load_average" of the last minute, "before" and "after";
        "results", each `Result.to_dict()`; "not_run", peers that could not run: "peer", "shape" and "reason".

    Raises:
        NoCoreError: there is no C++ core.
        WrongProductError: one of our products is wrong.
    """
    results, not_run = [], []
    races = len(shapes) * len(plan.rows)
    found = {"machine": machine(), "mode": plan.mode, "threads": plan.threads, "rounds": plan.rounds}
    before = os.getloadavg()[0]
    progress("measure", 0, races)
    with torch_threads(plan.threads):
        for shape in shapes:
            comparison = Comparison(shape, plan)
            for rows in plan.rows:
                results += [result.to_dict() for result in comparison.results(rows)]
                progress("measure", len(results) // len(plan.formats), races)
            not_run += [
                {"peer": peer, "shape": shape_name(shape), "reason": reason}
                for peer, reason in comparison.not_run.items()
            ]
    load = {"before": before, "after": os.getloadavg()[0]}
    return {**found, "load_average": load, "results": results, "not_run": not_run}


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch with a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
