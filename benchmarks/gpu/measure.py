"""Everything that is measured on one GPU: `LOBCQ_TRITON=1 python -m benchmarks.gpu.measure`.

The kernels' tests run first, on the GPU, and launch configurations are tuned; then come copy bandwidth, linears of
Llama-3-8B and 70B, encoders, and a Llama-3-8B-shaped model of random weights. Each product is checked before it is
timed, and contenders take turns. Results are written after every section, so that a run that is cut short leaves what
it has; a later run adds to what is there. The configurations go into the package, and into the results. Where a command
may take ten minutes: `--sections tests`, then `tuning copy "few rows"`, `"many rows" encoders`, and `model`.

    python -m benchmarks.gpu.measure --device cpu --smoke --output /tmp/smoke.json    # tries it out, needs no GPU

No GPU has run it yet.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.encoders import measure_encoders
from benchmarks.gpu.linears import measure_linear
from benchmarks.gpu.llama_linears import LINEARS
from benchmarks.gpu.model import LLAMA_3_8B, TINY, Load, measure_model
from benchmarks.gpu.timing import race, summary
from lobcq_fx.benchmarking.machine import installed_version

RESULT = Path(__file__).parents[1] / "results" / "gpu.json"
FEW_ROWS, MANY_ROWS = (1, 4, 16), (2048, 4096, 8192)
ENCODED = (4096, 8192)
COPIED_BYTES = 1 << 30
PACKAGES = ("torch", "triton", "transformers", "torchao", "bitsandbytes")


def main() -> None:
    """Command line."""
    arguments = parse()
    device = torch.device(arguments.device)
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    found |= {"machine": machine(device), "smoke": arguments.smoke}
    for name, section in sections(arguments, device):
        if name in arguments.sections:
            print(f"{name} ...", flush=True)
            for found[name] in section():
                arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(found[name], indent=1), flush=True)


def sections(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Callable[[], Iterator[Any]]]]:
    """What can be measured, in order, each as an iterator over what is known of it so far."""
    smoke, rounds = arguments.smoke, 2 if arguments.smoke else arguments.rounds
    linears = {"tiny": (64, 128)} if smoke else LINEARS
    few, many = ((1,), (20,)) if smoke else (FEW_ROWS, MANY_ROWS)

    def over(rows: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        for name, shape in linears.items():
            yield from measure_linear(name, shape, rows, rounds, device)

    yield "tests", lambda: iter([run_tests(device)])
    yield "tuning", lambda: tuned(linears, arguments.tuning_minutes * 60, device)
    yield "copy", lambda: iter([measure_copy(1 << 16 if smoke else COPIED_BYTES, rounds, device)])
    yield "few rows", lambda: lists(over(few))
    yield "many rows", lambda: lists(over(many))
    yield "encoders", lambda: iter([measure_encoders((32, 128) if smoke else ENCODED, rounds, device)])
    loads = [Load(1, 8, 6)] if smoke else [Load(1, 512, 32), Load(1, 2048, 32), Load(16, 512, 32), Load(64, 512, 32)]
    yield "model", lambda: measure_model(TINY if smoke else LLAMA_3_8B, loads, min(rounds, 3), device)


def lists(results: Iterator[Any]) -> Iterator[list[Any]]:
    """The results so far, after each."""
    found: list[Any] = []
    for result in results:
        found = [*found, result]
        yield found


def run_tests(device: torch.device) -> str:
    """The kernels' tests on this GPU; whatever fails ends the run: no speed for wrong results."""
    if device.type == "cpu":
        return "not run: no GPU"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    several = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []  # most of it is compiling
    command = [sys.executable, "-m", "pytest", "-q", "-x", *several, "tests/kernels/triton"]
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        sys.exit(f"the kernels' tests fail on this GPU, with status {done.returncode}")
    return "passed"


def tuned(linears: dict[str, tuple[int, int]], seconds: float, device: torch.device) -> Iterator[Any]:
    """Launch configurations for this GPU, which the sections after this use."""
    if device.type == "cpu":
        yield "not run: no GPU"
        return
    from benchmarks.gpu.tuning import tune  # imports triton

    yield from tune(linears, ["8x64", "8x128"], seconds, device)


def measure_copy(size: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Bytes read and written a second."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = summary(race({"copy": [lambda: target.copy_(source)]}, rounds, device), "copy")["copy"]["us"] / 1e6
    return {"bytes": size, "bytes_per_second": 2 * size / seconds}


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on and with."""
    gpu = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        gpu = {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "driver, clock, power": subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip(),
        }
    versions = {package: installed_version(package) for package in PACKAGES}
    return {**gpu, "cuda": torch.version.cuda, "python": platform.python_version(), "versions": versions}


def parse() -> argparse.Namespace:
    """Command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["tests", "tuning", "copy", "few rows", "many rows", "encoders", "model"]
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", nargs="+", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tuning-minutes", type=float, default=4)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.smoke and arguments.output == RESULT:
        parser.error("--smoke needs an --output of its own: its numbers are no results")
    return arguments


if __name__ == "__main__":
    main()
