"""Checks and races of benchmarks/model/generation.py, for one number of threads in a process of its own."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.model.folders import (
    CHECKED_TOKENS,
    ORT_INT4,
    TORCH_BF16,
    TORCH_FP32,
    W4A4,
    W4A4_HEAD,
    W4A16,
    Folders,
    prompt,
)
from benchmarks.model.onnx_model import OnnxModel
from benchmarks.model.plain_generate import generate_columns, race_generate
from benchmarks.model.torch_model import TorchModel, load_torch_model
from lobcq_fx.benchmarking.race import median_ratio, race

CODES_FLIP = 0.4
"""For models that encode activations: fp32 rounding becomes another 4-bit code here and there, and from layer to layer
the difference grows. Two ways to compute the same 16 layers of random weights differ by about 0.2, two layers by less
than 0.02; two unrelated rows of logits by 1.4."""

TOLERANCES = {TORCH_BF16: 0.05, ORT_INT4: 0.8, W4A4: CODES_FLIP, W4A4_HEAD: CODES_FLIP}
OTHER_TOLERANCE = 0.02
"""Relative errors in norm of a contender's logits against its reference, and of the compiled model's against the eager
one's: fp32 rounding; what bf16 and round-to-nearest int4 do to the float model's logits (int4 about 0.3 with 2 layers
of random weights)."""

CHECKED_STEPS = 4
GRAPHS = 64
"""Compiled frames allowed for one function: our models share one forward."""


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    names: tuple[str, ...]
    prompts: tuple[int, ...]
    steps: int
    decode_rounds: int
    prefill_rounds: Mapping[int, int]


@dataclass
class Generation:
    """Greedy decoding from one prompt, again and again."""

    model: Any
    token: Tensor
    start: Any
    cache: Any = None
    next: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rewind()

    def rewind(self) -> None:
        """Back to the prompt."""
        self.cache, self.next = self.model.fork(self.start), self.token

    def step(self) -> None:
        """One token."""
        logits, self.cache = self.model.step(self.next, self.cache)
        self.next = logits.argmax().view(1, 1)

    def last_step(self) -> None:
        """One token; the next step starts from the prompt."""
        self.step()
        self.rewind()


@torch.no_grad()
def measure_speed(folders: Folders, settings: Settings, threads: int) -> dict[str, Any]:
    """Seconds a step and a prompt, by loops written by hand and compiled, and seconds of plain `generate()`."""
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = GRAPHS
    logits = folders.logits()
    models, errors = {}, {}
    for name in settings.names:
        print(f"{threads} threads: loading and checking {name}", flush=True)
        models[name], errors[name] = _checked(folders, name, threads, logits)
    result: dict[str, Any] = {"threads": threads, "errors": errors, "load": os.getloadavg(), "prefill": {}}
    for length in settings.prompts:
        ids = prompt(length)
        bursts = {name: [_prefill(model, ids)] for name, model in models.items()}
        for name, times in race(bursts, settings.prefill_rounds[length]).items():
            result["prefill"].setdefault(name, {})[length] = times
    generations = {name: Generation(model, *_start(model, settings.prompts[0])) for name, model in models.items()}
    steps = {name: [one.step] * (settings.steps - 1) + [one.last_step] for name, one in generations.items()}
    for one in generations.values():
        one.step()
        one.last_step()  # whatever compiles for a second step compiles here
    result["decode"] = race(steps, settings.decode_rounds)
    modules = {name: model.module for name, model in models.items() if isinstance(model, TorchModel)}
    result["generate"] = race_generate(modules, prompt(settings.prompts[0]), settings.steps, settings.decode_rounds)
    result["steps"] = settings.steps
    return result


def summary(speed: dict[str, Any], prompts: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row a contender: tokens a second, and how many times as fast as the fp32 model called the same way."""
    rows = []
    for name, decode in speed["decode"].items():
        row: dict[str, Any] = {
            "threads": speed["threads"],
            "contender": name,
            "decode_tokens_per_second": 1 / statistics.median(decode),
            "decode_ratio": median_ratio(speed["decode"][TORCH_FP32], decode),
        }
        for length in prompts:
            prefill = speed["prefill"][name][length]
            row[f"prefill_{length}_tokens_per_second"] = length / statistics.median(prefill)
            row[f"prefill_{length}_ratio"] = median_ratio(speed["prefill"][TORCH_FP32][length], prefill)
        if name in speed["generate"]:
            row |= generate_columns(speed["generate"], name, TORCH_FP32, speed["steps"])
        rows.append(row)
    return rows


def _prefill(model: Any, ids: Tensor) -> Callable[[], object]:
    return lambda: model.prefill(ids)


def _start(model: Any, length: int) -> tuple[Tensor, Any]:
    logits, cache = model.prefill(prompt(length))
    return logits.argmax().view(1, 1), cache


def _checked(folders: Folders, name: str, threads: int, logits: Mapping[str, Tensor]) -> tuple[Any, dict[str, float]]:
    """A contender that computes what it should, and its errors."""
    model: Any
    if name.startswith("ORT"):
        model = OnnxModel(folders.onnx(name), threads)
        actual, _ = model.prefill(prompt(CHECKED_TOKENS))
        compiled = 0.0
    else:
        module = load_torch_model(folders, name)
        model, eager = TorchModel(module), TorchModel(module, compiled=False)
        actual, _ = eager.prefill(prompt(CHECKED_TOKENS))
        compiled = _compiled_error(name, model, eager)
    error = relative(actual, logits[name])
    if not error <= TOLERANCES.get(name, OTHER_TOLERANCE):
        raise SystemExit(f"{name} is wrong: relative error {error:.3g}, so no speed for it")
    against_float = relative(actual, logits[TORCH_FP32])
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
        token = expected.argmax().view(1, 1)
        states = [compiled.step(token, mine), eager.step(token, others)]
    return largest


def relative(actual: Tensor, expected: Tensor) -> float:
    """Error in norm."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())
