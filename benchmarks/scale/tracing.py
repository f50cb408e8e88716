"""Processor time of tracing a language model, by its layers: `python -m benchmarks.scale.tracing`.

A Llama of small sizes, which cost nothing here, in fp32. The graph for caches that grow, then both graphs; then both
made as `quantize` makes them where it can: of three layers. The least of three runs each, in one thread, after one that
warms up. Writes benchmarks/results/tracing.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from lobcq_fx.benchmarking.machine import machine
from lobcq_fx.errors import TraceError
from lobcq_fx.frontends import front_end_of

RESULT = Path(__file__).parents[1] / "results" / "tracing.json"
LAYERS = (2, 8, 32)
RUNS = 3


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    seconds(lambda: whole(model_of(1), static_cache=True))
    rows = [measured(layers) for layers in LAYERS]
    result = {"machine": machine(), "transformers": transformers.__version__, "rows": rows}
    print(json.dumps(rows, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measured(layers: int) -> dict[str, Any]:
    """Seconds of one graph, of both, and of both where layers are repeated; None where there are too few."""
    model = model_of(layers)
    ways: dict[str, Callable[[], object]] = {
        "growing": lambda: whole(model, static_cache=False),
        "both": lambda: whole(model, static_cache=True),
        "repeated": lambda: front_end_of(model).trace_repeated(model, static_cache=True),
    }
    found: dict[str, Any] = {"layers": layers}
    for name, way in ways.items():
        try:
            found[f"{name}_seconds"] = min(seconds(way) for _ in range(RUNS))
        except TraceError:
            found[f"{name}_seconds"] = None
    return found


def whole(model: LlamaForCausalLM, *, static_cache: bool) -> object:
    """Its graphs, of all layers."""
    return front_end_of(model).trace(model, None, static_cache=static_cache)


def model_of(layers: int) -> LlamaForCausalLM:
    """A Llama of random weights."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def seconds(way: Callable[[], object]) -> float:
    """Processor seconds of it."""
    start = time.process_time()
    way()
    return time.process_time() - start


if __name__ == "__main__":
    main()
