"""A Llama-shaped model of 1.1 billion random weights, generating on a CPU: `python -m benchmarks.model.generation`.

Contenders, batch 1: the fp32 and bf16 model and ours under torch.compile(fullgraph=True, dynamic=True); the fp32 and
the int4 model (MatMulNBits, head included) in ONNX Runtime; Q4_0 and Q4_K, head included, in llama.cpp, where
`--llama-cpp` names an interpreter that has it (benchmarks/model/llama_cpp). Each is checked first, by the logits of its
reference; then all take turns, and ratios are medians over the rounds. A decode burst starts from the same prompt each
time. Those are loops written by hand; plain, uncompiled `generate()` is measured too, the prompt and what follows
apart, for torch's side and beside llama.cpp. Memory is measured with each contender in a process of its own. Writes
benchmarks/results/cpu_model.json; the saved models go to a temporary folder (20 GB).

    python -m benchmarks.model.generation --layers 2 --rounds 2 --output /tmp/smoke.json    # a quick look
    python -m benchmarks.model.generation --decode-from 128 2048 --batches 1 4 16           # longer, and more at once
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.model.folders import (
    CONFIGS,
    LLAMA_CPP,
    NAMES,
    TORCH_FP32,
    W4A4,
    W4A4_HEAD,
    Folders,
    save_onnx_models,
    save_torch_models,
)
from benchmarks.model.llama_cpp.client import LlamaCpp, why_absent
from benchmarks.model.llama_cpp.models import save_llama_cpp_models
from benchmarks.model.memory import measure_memory
from benchmarks.model.speed import Settings, measure_speed, summary
from benchmarks.model.steps import measure_steps

RESULT = Path(__file__).parents[1] / "results" / "cpu_model.json"
PROFILED = (W4A4, W4A4_HEAD)


def main() -> None:
    """Command line."""
    arguments = parse()
    names = tuple(name for name in NAMES if name in arguments.contenders or name == arguments.against)
    reason = why_absent(arguments.llama_cpp)
    absent = {name: reason for name in names if name in LLAMA_CPP and reason}
    if arguments.against in absent:
        raise SystemExit(f"{arguments.against}, which ratios are of, cannot run: {reason}")
    for name in absent:
        print(f"not run: {name} ({reason})", flush=True)
    settings = Settings(
        tuple(name for name in names if name not in absent),
        arguments.against,
        tuple(arguments.prompts),
        tuple(arguments.decode_from or arguments.prompts[:1]),
        tuple(arguments.batches),
        arguments.steps,
        arguments.rounds,
        arguments.llama_cpp,
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        report = measure(Folders(Path(root)), settings, arguments) | {"not_run": absent}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(folders: Folders, settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, each part in a fresh process, so that none finds the memory or the compiled code of another."""
    alone(save_torch_models, folders, arguments.layers, settings.names)
    if any(name.startswith("ORT") for name in settings.names):
        alone(save_onnx_models, folders, settings.names)
    if LLAMA_CPP.keys() & set(settings.names):
        alone(save_llama_cpp_models, folders, settings.names, settings.llama_cpp)
    memory = [alone(measure_memory, folders, name, settings.llama_cpp) for name in settings.names]
    for row in memory:
        print(describe(row), flush=True)
    speeds, steps = [], []
    for threads in arguments.threads:
        speeds.append(alone(measure_speed, folders, settings, threads))
        for row in summary(speeds[-1], settings):
            print(describe(row), flush=True)
        for name in [name for name in PROFILED if name in settings.names]:
            steps.append(alone(measure_steps, folders, name, threads, settings.decode_from[0], settings.steps))
            print(json.dumps(steps[-1], indent=1), flush=True)
    return {
        "command": "python -m benchmarks.model.generation",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions(settings),
        "layers": arguments.layers,
        "against": settings.against,
        "prompts": settings.prompts,
        "decode_from": settings.decode_from,
        "batches": settings.batches,
        "steps": settings.steps,
        "formats": {name: CONFIGS[name].to_dict() for name in settings.names if name in CONFIGS},
        "memory": memory,
        "speed": [row for speed in speeds for row in summary(speed, settings)],
        "raw": speeds,
        "decode_step": steps,
    }


def versions(settings: Settings) -> dict[str, Any]:
    """Of what runs the contenders; of llama.cpp also what it was compiled for."""
    found: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "onnxruntime")}
    if LLAMA_CPP.keys() & set(settings.names):
        assert settings.llama_cpp is not None
        with LlamaCpp(settings.llama_cpp) as process:
            found |= process.call("versions")
    return found


def alone(function: Callable[..., Any], *values: Any) -> Any:
    """The function's result, from a fresh process; what it raises is raised here, and its death too.

    A `multiprocessing.Pool` would wait for ever for a worker that exits, as a failed check makes it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *values).result()


def describe(row: dict[str, Any]) -> str:
    """One line."""
    return "  ".join(f"{key} {value:.5g}" if isinstance(value, float) else f"{value}" for key, value in row.items())


def cpu_name() -> str:
    """As Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parse() -> argparse.Namespace:
    """Command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512], help="tokens of prompts that are read")
    parser.add_argument("--decode-from", type=int, nargs="+", help="tokens of prompts; default: the first of --prompts")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="more than one: of torch and llama.cpp")
    parser.add_argument("--steps", type=int, default=32, help="tokens of a decode burst")
    parser.add_argument("--rounds", type=int, default=7, help="fewer are run of prompts longer than twice the first")
    parser.add_argument("--contenders", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--against", default=TORCH_FP32, choices=NAMES, help="always runs: the one that ratios are of")
    parser.add_argument("--llama-cpp", type=Path, metavar="PYTHON", help="an interpreter that imports llama_cpp")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
