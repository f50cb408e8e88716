"""How long `lobcq_fx.load` takes with and without comparing digests: linears of random weights, in turns.

python -m benchmarks.model.loading                     # 1,074 million weights: 604 MB on disk
python -m benchmarks.model.loading --layers 4 --size 1024
python -m benchmarks.model.loading --folder DIR        # a saved language model, from a new process to its first token

All read a file that the system has in its cache, so that the digests' share is at its largest. With --folder, seconds
of the clock and of all cores together are printed, the least of the rounds, by the number of threads; nothing is
written.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lobcq_fx

PROMPT = 48
"""Tokens."""

RESULT = Path(__file__).parents[1] / "results" / "loading.json"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help=f"default with the default sizes: {RESULT.name}")
    parser.add_argument("--folder", type=Path, help="a language model that save_pretrained has written")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        print_new_processes(arguments.folder, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        target, x = Path(folder) / "q", torch.randn(2, arguments.size).bfloat16()
        save(target, arguments.layers, arguments.size, x)
        assert torch.equal(lobcq_fx.load(target)(x), lobcq_fx.load(target, verify=False)(x))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(arguments.rounds):
            for verify in (True, False) if number % 2 else (False, True):
                gc.collect()  # the model before, whose memory would be given back at any time
                start = time.perf_counter()
                lobcq_fx.load(target, verify=verify)
                seconds[verify].append(time.perf_counter() - start)
        ratios = [one / other for one, other in zip(seconds[True], seconds[False], strict=True)]
        result = {
            "weights": arguments.layers * arguments.size**2,
            "bytes": sum(file.stat().st_size for file in target.iterdir()),
            "threads": torch.get_num_threads(),
            "torch": version("torch"),
            "seconds": {"verify": statistics.median(seconds[True]), "no verify": statistics.median(seconds[False])},
            "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        }
    print(json.dumps(result, indent=1))
    output = arguments.output or (RESULT if (arguments.layers, arguments.size) == (64, 4096) else None)
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def save(target: Path, layers: int, size: int, x: torch.Tensor) -> None:
    """A model whose float weights are made one after the other, and let go as they are quantized."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=torch.bfloat16) for _ in range(layers))).eval()
    lobcq_fx.quantize(model, example_inputs=x, inplace=True).save_pretrained(target)


def print_new_processes(folder: Path, rounds: int) -> None:
    """Measure and print."""
    from benchmarks.model.generation import alone  # imports transformers, which is measured in the new processes

    counts = sorted({1, os.cpu_count() or 1})
    found: dict[int, list[dict[str, Any]]] = {threads: [] for threads in counts}
    for _ in range(rounds):
        for threads in counts:
            found[threads].append(alone(new_process, folder, threads))
    for threads, results in found.items():
        assert len({one["token"] for one in results}) == 1, "the same model gives another token"
        for step in ("imports", "load", "first token"):
            clock, cores = (min(one[step][kind] for one in results) for kind in (0, 1))
            print(f"{threads} threads, {step}: {clock:.2f} s, {cores:.2f} s of all cores")


def new_process(folder: Path, threads: int) -> dict[str, Any]:
    """In a process that has imported torch: seconds of the clock, and of all cores, for each step; and the token."""
    torch.set_num_threads(threads)
    found: dict[str, Any] = {}

    def timed(step: str, action: Callable[[], Any]) -> Any:
        clock, cores = time.perf_counter(), time.process_time()
        result = action()
        found[step] = (time.perf_counter() - clock, time.process_time() - cores)
        return result

    timed("imports", lambda: importlib.import_module("lobcq_fx.frontends.causal_lm_front_end"))
    model = timed("load", lambda: lobcq_fx.load(folder))
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = timed("first token", lambda: model(ids, logits_to_keep=1).logits)
    return found | {"token": int(logits.argmax())}


if __name__ == "__main__":
    main()
