"""Times of calls on a GPU: each burst captured once as a CUDA graph, all replayed in turns.

A graph leaves out what Python and the launches cost, as a compiled model's step does, for every contender alike. On a
CPU, where the scripts are only tried out, bursts are called as they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from lobcq_fx.benchmarking.race import Burst, median_ratio, take_turns

WARM_UP = 3


def race(bursts: Mapping[str, Burst], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of every contender in every round, the order shuffled anew for each."""
    runs = {name: (captured(burst, device), len(burst)) for name, burst in bursts.items()}
    return take_turns(runs, rounds, lambda run: timed(run[0], device) / run[1])


def captured(burst: Burst, device: torch.device) -> Callable[[], object]:
    """One call for the whole burst."""

    def run() -> None:
        for call in burst:
            call()

    if device.type == "cpu":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # compiles kernels and fills the allocator, which a capture must not
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, after one that is not timed."""
    run()
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


def summary(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, dict[str, float]]:
    """For each contender the median of its microseconds, and of how many times as fast as the baseline it was."""
    base = times[baseline]
    return {
        name: {
            "us": 1e6 * statistics.median(seconds),
            f"times {baseline}": median_ratio(base, seconds),
        }
        for name, seconds in times.items()
    }
