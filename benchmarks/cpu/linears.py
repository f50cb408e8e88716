"""The CPU core's linear, in W4A4 if nothing else is said, against other linears: what the README's speed tables show.

    python -m benchmarks.cpu.linears

Every combination of shape, format, number of rows and threads, as `lobcq bench` measures it, and how fast the core
encodes. Each number of threads has a process of its own. Needs `pip install "lobcq-fx[bench]"` for all peers and about
8 GiB of memory; leave the machine alone meanwhile. Writes benchmarks/results/cpu.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from lobcq_fx.benchmarking.comparison import ROWS, SHAPES, Plan, shape_name
from lobcq_fx.benchmarking.encoding import encoding_rates
from lobcq_fx.benchmarking.measure import measure, torch_threads
from lobcq_fx.benchmarking.peers import PEERS
from lobcq_fx.format import FormatSpec

RESULT = Path(__file__).parents[1] / "results" / "cpu.json"
FORMATS = ("8x64", "16x64", "8x128", "16x128")


def main() -> None:
    """Measure, print, write."""
    arguments = parse()
    shapes = [(int(n), int(k)) for n, _, k in (text.partition("x") for text in arguments.shapes)]
    runs = []
    for threads in dict.fromkeys(arguments.threads):
        plan = Plan(
            formats=tuple(FormatSpec.from_name(name) for name in arguments.formats),
            rows=tuple(arguments.rows),
            rounds=arguments.rounds,
            threads=threads,
            mode=arguments.mode,
            peers=tuple(peer for peer in PEERS if peer.name in arguments.peers),
        )
        print(f"== {threads} threads", flush=True)
        runs.append(in_own_process(shapes, plan))
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"measure": "cpu linear", "runs": runs}, indent=1) + "\n")


def in_own_process(shapes: Sequence[tuple[int, int]], plan: Plan) -> dict[str, Any]:
    """`run`, where no other number of threads has been before: ONNX Runtime's pool keeps its size."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, shapes, plan).result()


def run(shapes: Sequence[tuple[int, int]], plan: Plan) -> dict[str, Any]:
    """What `measure` finds, and "encoding": the rates of `encoding_rates`."""
    found = measure(shapes, plan, Printer())
    with torch_threads(plan.threads):
        return {**found, "encoding": encoding_rates(plan.formats, plan.rounds)}


class Printer:
    """Progress as lines that a log can keep."""

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Called as `measure` does."""
        print(f"   {step}: {done} of {total}", flush=True)


def parse() -> argparse.Namespace:
    """Command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--shapes", nargs="+", default=[shape_name(shape) for shape in SHAPES], metavar="NxK")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--mode", default="w4a4", choices=("w4a4", "w4a8", "w4a16"))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--peers", nargs="*", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
