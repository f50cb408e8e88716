"""Checks and races of benchmarks/model/generation.py, for one number of threads in a process of its own."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.model.folders import (
    CHECKED_TOKENS,
    LLAMA_CPP,
    ORT_INT4,
    TORCH_BF16,
    TORCH_FP32,
    W4A4,
    W4A4_HEAD,
    W4A8,
    W4A16,
    Folders,
    prompt,
)
from benchmarks.model.llama_cpp.client import LlamaCpp, LlamaCppModel
from benchmarks.model.onnx_model import OnnxModel
from benchmarks.model.plain_generate import generate_columns, race_generate
from benchmarks.model.torch_model import TorchModel, load_torch_model
from benchmarks.model.turns import Turn, decode_turn, prefill_turn
from lobcq_fx.benchmarking.race import median_ratio, take_turns

CODES_FLIP = 0.4
"""For models that encode activations: fp32 rounding becomes another 4-bit code here and there, and from layer to layer
the difference grows. Two ways to compute the same 16 layers of random weights differ by about 0.2, two layers by less
than 0.1; two unrelated rows of logits by 1.4."""

TOLERANCES = {TORCH_BF16: 0.05, ORT_INT4: 0.8, W4A4: CODES_FLIP, W4A4_HEAD: CODES_FLIP, W4A8: 0.05}
TOLERANCES |= dict.fromkeys(LLAMA_CPP, 0.9)
OTHER_TOLERANCE = 0.02
"""Relative errors in norm of a contender's logits against its reference, and of the compiled model's against the eager
one's: fp32 rounding; what bf16 and round-to-nearest int4 do to the float model's logits (int4 about 0.3 with 2 layers
of random weights)."""

CHECKED_STEPS = 4
GRAPHS = 64
"""Compiled frames allowed for one function: our models share one forward."""


@dataclass(frozen=True)
class Settings:
    """What to measure.

    names: contenders. against: the one of them that ratios are of. prompts: tokens of each that is read.
    decode_from: tokens of prompts that steps are made behind.
    batches: sequences at once, behind the first of those. steps: of a decode burst. rounds: fewer of long prompts.
    llama_cpp: an interpreter that imports llama_cpp, where any contender needs it.
    """

    names: tuple[str, ...]
    against: str
    prompts: tuple[int, ...]
    decode_from: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    rounds: int
    llama_cpp: Path | None = None

    def rounds_of(self, length: int) -> int:
        """Of a prompt's races: fewer where it is longer than twice the first."""
        return max(2, round(self.rounds * min(1, 2 * self.prompts[0] / length)))

    @property
    def decodes(self) -> list[tuple[int, int]]:
        """Prompt and number of sequences of each decode race."""
        batches = [batch for batch in self.batches if batch > 1]
        return [(length, 1) for length in self.decode_from] + [(self.decode_from[0], batch) for batch in batches]


@torch.no_grad()
def measure_speed(folders: Folders, settings: Settings, threads: int) -> dict[str, Any]:
    """Seconds a step and a prompt, by loops written by hand and compiled, and seconds of plain `generate()`."""
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = GRAPHS
    logits = folders.logits()
    models, errors = {}, {}
    for name in settings.names:
        print(f"{threads} threads: loading and checking {name}", flush=True)
        models[name], errors[name] = _checked(folders, name, threads, logits, settings.llama_cpp)
    result: dict[str, Any] = {"threads": threads, "steps": settings.steps, "errors": errors, "load": os.getloadavg()}
    result |= {"prefill": {}, "decode": {}, "generate": {}}
    for length in settings.prompts:
        turns = {name: prefill_turn(model, prompt(length)) for name, model in models.items()}
        for name, times in take_turns(turns, settings.rounds_of(length), _take).items():
            result["prefill"].setdefault(name, {})[str(length)] = times
    for length, batch in settings.decodes:
        able = {name: model for name, model in models.items() if batch == 1 or not isinstance(model, OnnxModel)}
        ids = prompt(length, batch)
        turns = {name: decode_turn(model, ids, settings.steps) for name, model in able.items()}
        for name, times in take_turns(turns, settings.rounds, _take).items():
            result["decode"].setdefault(name, {})[decode_name(length, batch, settings)] = times
    able = {name: getattr(model, "module", model) for name, model in models.items() if not isinstance(model, OnnxModel)}
    for length in settings.decode_from:
        found = race_generate(able, prompt(length), settings.steps, settings.rounds_of(length))
        result["generate"][str(length)] = found
    return result


def decode_name(length: int, batch: int, settings: Settings) -> str:
    """Of a decode race in results: the first one's is "decode"."""
    parts = [f"_{length}"] if length != settings.decode_from[0] else []
    return "".join(["decode", *parts, *([f"_batch_{batch}"] if batch > 1 else [])])


def _take(turn: Turn) -> float:
    return turn()


def summary(speed: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """One row a contender: tokens a second, of all sequences, and how many times as fast as `settings.against` is.

    "decode" and "prefill" are of the loops, "generate" of plain `generate()`.
    """
    rows = []
    for name, decode in speed["decode"].items():
        row: dict[str, Any] = {"threads": speed["threads"], "contender": name}
        for length, batch in settings.decodes:
            race = decode_name(length, batch, settings)
            if race in decode:
                row[f"{race}_tokens_per_second"] = batch / statistics.median(decode[race])
                row[f"{race}_ratio"] = median_ratio(speed["decode"][settings.against][race], decode[race])
        for length in settings.prompts:
            prefill = speed["prefill"][name][str(length)]
            row[f"prefill_{length}_tokens_per_second"] = length / statistics.median(prefill)
            row[f"prefill_{length}_ratio"] = median_ratio(speed["prefill"][settings.against][str(length)], prefill)
        for length in settings.decode_from:
            times = speed["generate"][str(length)]
            if name in times:
                prefix = "generate" if length == settings.decode_from[0] else f"generate_{length}"
                columns = generate_columns(times, name, settings.against, length, speed["steps"])
                row |= {key.replace("generate", prefix, 1): value for key, value in columns.items()}
        rows.append(row)
    return rows


def _checked(
    folders: Folders, name: str, threads: int, logits: Mapping[str, Tensor], llama_cpp: Path | None
) -> tuple[Any, dict[str, float]]:
    """A contender that computes what it should, and its errors."""
    model: Any
    compiled = 0.0
    if name.startswith("ORT"):
        model = OnnxModel(folders.onnx(name), threads)
        actual, _ = model.prefill(prompt(CHECKED_TOKENS))
    elif name in LLAMA_CPP:
        assert llama_cpp is not None, f"{name} has no interpreter"
        model = LlamaCppModel(LlamaCpp(llama_cpp), folders.gguf(name), threads)
        actual = model.logits(prompt(CHECKED_TOKENS))
    else:
        module = load_torch_model(folders, name)
        model, eager = TorchModel(module), TorchModel(module, compiled=False)
        actual, _ = eager.prefill(prompt(CHECKED_TOKENS))
        compiled = _compiled_error(name, model, eager)
    error = relative(actual[0], logits[name])
    if not error <= TOLERANCES.get(name, OTHER_TOLERANCE):
        raise SystemExit(f"{name} is wrong: relative error {error:.3g}, so no speed for it")
    against_float = relative(actual[0], logits[TORCH_FP32])
    return model, {"to_reference": error, "to_fp32": against_float, "compiled_to_eager": compiled}


def _compiled_error(name: str, compiled: TorchModel, eager: TorchModel) -> float:
    """Largest relative error over a prompt and some steps; exits if W4A16 chooses another token than its eager self."""
    ids, largest = prompt(CHECKED_TOKENS), 0.0
    states = [compiled.prefill(ids), eager.prefill(ids)]
    for _ in range(CHECKED_STEPS):
        (actual, mine), (expected, others) = states
        largest = max(largest, relative(actual, expected))
        if largest > TOLERANCES.get(name, OTHER_TOLERANCE):
            raise SystemExit(f"{name}: the compiled model's logits are off by {largest:.3g}, so no speed for it")
        if name == W4A16 and actual.argmax() != expected.argmax():
            raise SystemExit(f"{name}: the compiled model chose another token than the eager one, so no speed for it")
        token = expected.argmax(dim=-1, keepdim=True)
        states = [compiled.step(token, mine), eager.step(token, others)]
    return largest


def relative(actual: Tensor, expected: Tensor) -> float:
    """Error in norm."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())
