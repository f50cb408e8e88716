"""From a float checkpoint to a quantized model's first token, each step in a new process, as users call them.

    python -m benchmarks.model.first_token                             # 1.1 billion weights in bf16: 4 GB of disk
    python -m benchmarks.model.first_token --layers 2 --output /tmp/x  # a quick look
    python -m benchmarks.model.first_token --quantized DIR             # a saved language model: printed, not written

`lobcq quantize` once, with nothing said about the model; then `lobcq_fx.load` and a call on a prompt, of whose seconds
the least of the rounds are taken: of the clock, and of all cores together, by the number of threads. The files are in
the system's cache.
Writes benchmarks/results/first_token.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lobcq_fx

PROMPT = 48
"""Tokens."""

RESULT = Path(__file__).parents[1] / "results" / "first_token.json"

OPENED = ("imports", "load", "first token")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--quantized", type=Path, help="a language model that save_pretrained has written")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.quantized is not None:
        opened(arguments.quantized, arguments.threads, arguments.rounds)
        return
    from benchmarks.model.generation import alone, cpu_name  # not above: new processes import this file

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, target = Path(folder) / "float", Path(folder) / "quantized"
        parameters = alone(save_float_model, source, arguments.layers)
        quantized = [quantize(source, target, threads) for threads in arguments.threads]
        report = {
            "cpu": cpu_name(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "parameters": parameters,
            "float_bytes": bytes_of(source),
            "packed_bytes": bytes_of(target),
            "prompt": PROMPT,
            "quantize": quantized,
            "open": opened(target, arguments.threads, arguments.rounds),
        }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def save_float_model(folder: Path, layers: int) -> int:
    """Write a checkpoint; how many parameters it has."""
    from transformers import LlamaForCausalLM

    from benchmarks.model.folders import model_config

    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(layers)).bfloat16()
    model.save_pretrained(folder)
    return sum(one.numel() for one in model.parameters())


def bytes_of(folder: Path) -> int:
    """Size on disk."""
    return sum(file.stat().st_size for file in folder.iterdir())


def quantize(source: Path, target: Path, threads: int) -> dict[str, Any]:
    """What `lobcq quantize` takes, and what it says of its steps."""
    command = [sys.executable, "-m", "lobcq_fx", "quantize", str(source), "-o", str(target), "--json", "--overwrite"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    steps = json.loads(done.stdout)["seconds_by_step"]
    print(f"{threads} threads, lobcq quantize: {clock:.1f} s, {cores:.1f} s of all cores; {steps}", flush=True)
    return {"threads": threads, "seconds": clock, "cores": cores, "steps": steps}


def opened(folder: Path, threads: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Of each number of threads the least of the rounds, by step: seconds of the clock and of all cores."""
    from benchmarks.model.generation import alone  # imports transformers, which new processes are to do by themselves

    found: dict[int, list[dict[str, Any]]] = {count: [] for count in threads}
    for _ in range(rounds):
        for count in threads:
            found[count].append(alone(new_process, folder, count))
    rows = []
    for count, results in found.items():
        assert len({one["token"] for one in results}) == 1, "the same model gives another token"
        steps = {step: [min(one[step][kind] for one in results) for kind in (0, 1)] for step in OPENED}
        for step, (clock, cores) in steps.items():
            print(f"{count} threads, {step}: {clock:.2f} s, {cores:.2f} s of all cores", flush=True)
        rows.append({"threads": count, "rounds": rounds, "steps": steps})
    return rows


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
