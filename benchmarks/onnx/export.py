"""Our ONNX export in ONNX Runtime against its own int4 and fp32, one model: `python -m benchmarks.onnx.export`.

The model is that of benchmarks/model/generation.py: Llama-shaped, 1.1 billion random weights, batch 1. Contenders, all
of the same weights: transformers' fp32 export; that quantized to MatMulNBits int4, head included, at accuracy levels 0
and 4; ours with the op library, head in fp32 or in W4A16. Every graph has ONNX Runtime's GroupQueryAttention, and a
head that computes the last position alone. Each export of ours was compared with its torch model; each contender's
logits are compared with their reference here, before anything is timed. Then all take turns, and ratios are medians
over the rounds. Session creation and memory are measured in a process for each. Writes
benchmarks/results/onnx_export.json.

A quick look: `python -m benchmarks.onnx.export --layers 2 --rounds 2 --models /tmp/small --output /tmp/smoke.json`
"""

from __future__ import annotations

import argparse
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

import lobcq_fx
from benchmarks.model.folders import (
    CHECKED_TOKENS,
    ORT_FP32,
    ORT_INT4,
    W4A4,
    W4A4_HEAD,
    Folders,
    prompt,
    save_onnx_models,
    save_torch_models,
)
from benchmarks.model.generation import alone, cpu_name, describe
from benchmarks.model.memory import MIB, status_mib
from benchmarks.model.onnx_model import OnnxModel, quantize_onnx
from benchmarks.model.speed import CODES_FLIP, relative
from benchmarks.model.turns import Generation
from lobcq_fx.benchmarking.race import median_ratio, race
from lobcq_fx.export.library import is_available

RESULT = Path(__file__).parents[1] / "results" / "onnx_export.json"

LEVEL_0, LEVEL_4 = "ORT int4, level 0", ORT_INT4
OURS, OURS_HEAD = "ONNX lobcq W4A4", "ONNX lobcq W4A4, head W4A16"
NAMES = (ORT_FP32, LEVEL_0, LEVEL_4, OURS, OURS_HEAD)
SOURCES = {OURS: W4A4, OURS_HEAD: W4A4_HEAD}
TOLERANCES = {ORT_FP32: 0.02, LEVEL_0: 0.8, LEVEL_4: 0.8, OURS: CODES_FLIP, OURS_HEAD: CODES_FLIP}
"""Relative errors in norm, for the reasons that benchmarks/model/speed.py gives."""


def main() -> None:
    """Command line."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as root:
        folders = Folders(arguments.models or Path(root))
        report = measure(folders, arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(folders: Folders, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, each part in a fresh process."""
    exports = alone(make_models, folders, arguments.layers)
    memory = [alone(measure_session, folders, name) for name in NAMES]
    for row in memory:
        print(describe(row), flush=True)
    speeds = []
    for threads in arguments.threads:
        speeds.append(alone(measure_speed, folders, threads, arguments.prompts, arguments.steps, arguments.rounds))
        for row in summary(speeds[-1]):
            print(describe(row), flush=True)
    return {
        "command": "python -m benchmarks.onnx.export",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "onnx", "onnxruntime")},
        "layers": arguments.layers,
        "prompts": arguments.prompts,
        "steps": arguments.steps,
        "exports": exports,
        "sessions": memory,
        "speed": [row for speed in speeds for row in summary(speed)],
        "raw": speeds,
    }


def make_models(folders: Folders, layers: int) -> dict[str, Any]:
    """Write what is not there yet; seconds that our exports took, and what their self-checks found."""
    folders.root.mkdir(parents=True, exist_ok=True)
    if not folders.onnx(LEVEL_4).is_file():
        save_torch_models(folders, layers, (W4A4, W4A4_HEAD))
        save_onnx_models(folders, (LEVEL_4,))
    if not folders.onnx(LEVEL_0).is_file():
        quantize_onnx(folders.onnx(ORT_FP32), folders.onnx(LEVEL_0), accuracy_level=0)
    report = folders.root / "exports.json"
    if not report.is_file():
        report.write_text(json.dumps({name: export(folders, name) for name in SOURCES}))
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def export(folders: Folders, name: str) -> dict[str, Any]:
    """Our folder of one configuration."""
    q = lobcq_fx.load(folders.of(SOURCES[name]))
    print(f"exporting {name}", flush=True)
    start = time.perf_counter()
    summary = lobcq_fx.export_onnx(q, folders.of(name), last_logits_only=True)
    packed = (folders.of(SOURCES[name]) / "lobcq.safetensors").stat().st_size
    return {
        "seconds": time.perf_counter() - start,
        "disk_to_packed": summary.size / packed,
        "difference_functions": summary.differences.functions,
        "difference_library": summary.differences.library,
        "moved_codes": summary.differences.moved_codes,
        "fused_attentions": summary.fused_attentions,
    }


def open_model(folders: Folders, name: str, threads: int) -> OnnxModel:
    """A contender's session."""
    return OnnxModel(folders.onnx(name), threads, use_library=name in SOURCES)


@torch.no_grad()
def measure_session(folders: Folders, name: str) -> dict[str, Any]:
    """Seconds to create a session, and MiB above what the imported modules take: then, after a call, at most."""
    import onnxruntime  # noqa: F401

    is_available()  # loads the core
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to what is resident now
    start = time.perf_counter()
    model = open_model(folders, name, 1)
    seconds = time.perf_counter() - start
    created, peak = status_mib("VmRSS") - before, status_mib("VmHWM") - before
    logits, cache = model.prefill(prompt(CHECKED_TOKENS))
    model.step(logits.argmax().view(1, 1), cache)
    return {
        "contender": name,
        "disk_mib": sum(file.stat().st_size for file in folders.of(name).glob("model.onnx*")) / MIB,
        "create_seconds": seconds,
        "created_mib": created,
        "creation_peak_mib": peak,
        "used_mib": status_mib("VmRSS") - before,
        "peak_mib": status_mib("VmHWM") - before,
    }


@torch.no_grad()
def measure_speed(folders: Folders, threads: int, prompts: list[int], steps: int, rounds: int) -> dict[str, Any]:
    """Seconds a step and a prompt, in turns."""
    logits = folders.logits()
    references = {OURS: logits[W4A4], OURS_HEAD: logits[W4A4_HEAD]}
    models, errors = {}, {}
    for name in NAMES:
        models[name] = open_model(folders, name, threads)
        found, _ = models[name].prefill(prompt(CHECKED_TOKENS))
        errors[name] = relative(found[0], references.get(name, logits[ORT_FP32]))
        if not errors[name] <= TOLERANCES[name]:
            raise SystemExit(f"{name} is wrong: relative error {errors[name]:.3g}, so no speed for it")
    result: dict[str, Any] = {"threads": threads, "errors": errors, "load": os.getloadavg(), "prefill": {}}
    for length in prompts:
        ids = prompt(length)
        for name, times in race({name: [_prefill(model, ids)] for name, model in models.items()}, rounds).items():
            result["prefill"].setdefault(name, {})[str(length)] = times
    bursts = {}
    for name, model in models.items():
        first, cache = model.prefill(prompt(prompts[0]))
        generation = Generation(model, first.argmax().view(1, 1), cache)
        bursts[name] = [generation.step] * (steps - 1) + [generation.last_step]
    result["decode"] = race(bursts, rounds)
    return result


def _prefill(model: OnnxModel, ids: torch.Tensor) -> Callable[[], object]:
    return lambda: model.prefill(ids)


def summary(speed: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each contender: tokens a second, and how many times as fast as each of ORT's own ours are."""
    rows = []
    for name, decode in speed["decode"].items():
        row = {
            "threads": speed["threads"],
            "contender": name,
            "decode_tokens_per_second": 1 / statistics.median(decode),
        }
        row |= {f"decode_x_{other}": median_ratio(speed["decode"][other], decode) for other in NAMES[:3]}
        for length, times in speed["prefill"][name].items():
            row[f"prefill_{length}_tokens_per_second"] = int(length) / statistics.median(times)
            for other in NAMES[:3]:
                row[f"prefill_{length}_x_{other}"] = median_ratio(speed["prefill"][other][length], times)
        rows.append(row)
    return rows


def parse() -> argparse.Namespace:
    """Command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512], help="the first is decoded from")
    parser.add_argument("--steps", type=int, default=16, help="tokens of a decode burst")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=Path, help="keeps the models (15 GB), and takes those that are there")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
