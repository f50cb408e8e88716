"""A Llama-3-8B-shaped model of random weights on a GPU: prompts, and steps from a static cache, each one CUDA graph.

Steps run under torch.compile(mode="reduce-overhead", fullgraph=True), prompts as they are: uncompiled, with what Python
costs, for both. Kernels are checked first, in a narrow model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import lobcq_fx
from benchmarks.gpu.linears import check
from benchmarks.gpu.timing import timed
from lobcq_fx.frontends.output_types import CACHE_NAME

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = LLAMA_3_8B | {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 512,
}  # fmt: skip
"""For checking the kernels, and for trying the script out."""

TOLERANCE = 0.05
"""Relative error in norm of logits: an activation that rounding moves to another code moves them by about 1 %."""


@dataclass(frozen=True)
class Load:
    """Sequences, tokens before the first step, and tokens written."""

    batch: int
    prompt: int
    steps: int


def measure_model(shape: dict[str, Any], loads: list[Load], rounds: int, device: torch.device) -> Iterator[Any]:
    """After each load, what is known so far: steps and prompts of both models in turns, the bytes of their weights."""
    _check_kernels(device)
    model = _random_model(shape, device)
    models: dict[str, Any] = {"bf16": model, "lobcq W4A4": lobcq_fx.quantize(model)}
    # Elsewhere nothing is measured that counts, and inductor would compile for a minute.
    how = {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "aot_eager"}
    compiled = {name: torch.compile(one, fullgraph=True, **how) for name, one in models.items()}
    results = []
    with torch.inference_mode():
        for load in loads:
            times: dict[str, list[dict[str, float]]] = {name: [] for name in models}
            for _ in range(rounds):
                for name, call in compiled.items():
                    times[name].append(_generate(models[name], call, load, device))
            results.append({**load.__dict__, "times": _summary(times)})
            weights = {name: _bytes(one) for name, one in models.items()}
            yield {"shape": shape, "weight_bytes": weights, "loads": list(results)}


def _generate(model: Any, call: Callable[..., Any], load: Load, device: torch.device) -> dict[str, float]:
    """Seconds of the prompt, eagerly, and of a step, compiled."""
    cache = StaticCache(model.config, max_cache_len=load.prompt + load.steps)
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (load.batch, load.prompt), generator=generator, device=device)

    def prefill() -> Tensor:
        cache.reset()
        return model(input_ids=ids, logits_to_keep=1, **{CACHE_NAME: cache}).logits

    prompt = timed(prefill, device)
    token = ids[:, -1:].contiguous()
    positions = torch.full((1, 1), load.prompt, device=device)

    def step() -> Tensor:
        return call(input_ids=token, position_ids=positions, logits_to_keep=1, **{CACHE_NAME: cache}).logits.clone()

    step()
    seconds = [timed(step, device) for _ in range(max(1, load.steps // 2 - 1))]
    return {"prompt": prompt, "step": statistics.median(seconds)}


def _summary(times: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and of the ratios to bf16 in the same round."""
    return {
        name: {
            f"{what} {kind}": statistics.median(values)
            for what in ("prompt", "step")
            for kind, values in {
                "ms": [1e3 * one[what] for one in rounds],
                "times bf16": [base[what] / one[what] for base, one in zip(times["bf16"], rounds, strict=True)],
            }.items()
        }
        for name, rounds in times.items()
    }


def _check_kernels(device: torch.device) -> None:
    """Logits of a narrow model on the GPU against those of the CPU, whose kernels are tested everywhere."""
    q = lobcq_fx.quantize(_random_model(TINY, torch.device("cpu")))
    ids = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = q(ids).logits
        check("a narrow model", q.to(device)(ids.to(device)).logits.cpu(), expected, TOLERANCE)


def _random_model(shape: dict[str, Any], device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16).eval()


def _bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
