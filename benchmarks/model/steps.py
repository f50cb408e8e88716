"""Where the milliseconds of a compiled decode step of ours go, how often it compiles, how fast it could be at best."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile

from benchmarks.model.folders import Folders, prompt
from benchmarks.model.speed import GRAPHS
from benchmarks.model.torch_model import TorchModel, load_torch_model
from benchmarks.model.turns import Generation
from lobcq_fx.benchmarking.race import race
from lobcq_fx.benchmarking.reading import MODEL_BYTES, read_rate, reading_bursts
from lobcq_fx.benchmarking.step_reads import bytes_of_a_step, bytes_of_states

GROUPS = {
    "our kernels, attention and norms among them": ("lobcq::",),
    "float matmuls (head)": ("aten::mm", "aten::addmm", "aten::linear", "mkl::", "mkldnn::", "aten::bmm"),
    "Inductor's kernels": ("cpp_fused", "graph_"),
    "guards": ("TorchDynamo Cache Lookup",),
}
REST = "the rest (Python, dispatch, allocation)"
READ_ROUNDS = 7


@torch.no_grad()
def measure_steps(folders: Folders, name: str, threads: int, length: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step in each group of events; compiled graphs; the floor that memory bandwidth sets."""
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = GRAPHS
    inductor.cpp.enable_kernel_profile = True
    module = load_torch_model(folders, name)
    model, graphs = TorchModel(module), []
    logits, cache = model.prefill(prompt(length))
    graphs.append(_graphs())
    generation = Generation(model, logits.argmax(dim=-1, keepdim=True), cache)
    for _ in range(steps):
        generation.step()
        graphs.append(_graphs())
    generation.rewind()
    plain = [_timed(generation) for _ in range(steps)]
    generation.rewind()
    with profile(activities=[ProfilerActivity.CPU]) as events:
        profiled = [_timed(generation) for _ in range(steps)]
    weights, caches = bytes_of_a_step(module, prompt(length)), bytes_of_states(module, prompt(length))
    bandwidth = read_rate(race(reading_bursts(MODEL_BYTES), READ_ROUNDS), MODEL_BYTES)
    return {
        "contender": name,
        "threads": threads,
        "step_ms": statistics.median(plain) * 1e3,
        "profiled_step_ms": statistics.mean(profiled) * 1e3,
        "parts_ms": _parts(events, statistics.mean(profiled) * 1e3, steps),
        "graphs": {"prompt": graphs[0], "first step": graphs[1], "second step": graphs[2], "last step": graphs[-1]},
        "bytes_read": {"weights": weights, "prompt's keys and values": caches},
        "read_gb_per_second": bandwidth / 1e9,
        "floor_ms": (weights + caches) / bandwidth * 1e3,
    }


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _timed(generation: Generation) -> float:
    start = time.perf_counter()
    generation.step()
    return time.perf_counter() - start


def _parts(events: profile, step_ms: float, steps: int) -> dict[str, float]:
    """Time with what was called from within for operators, so that their allocations count as theirs."""
    parts = dict.fromkeys(GROUPS, 0.0)
    for event in events.key_averages():
        for group, prefixes in GROUPS.items():
            if event.key.startswith(prefixes):
                parts[group] += event.cpu_time_total / 1e3 / steps
    return parts | {REST: step_ms - sum(parts.values())}
