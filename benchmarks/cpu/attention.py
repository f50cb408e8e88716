"""Attention over keys and values in LO-BCQ on the CPU, against torch's over floats: alone, and as a part of a model.

    python -m benchmarks.cpu.attention

Alone: `lobcq::attention`, its products in fp32 (W4A16) and in integers (W4A8), and `scaled_dot_product_attention` over
fp32 keys and values that no query head repeats; results are compared first. Times are without what puts the call's
own tokens into the cache. As a part: a prompt, and a step after it, of a language model of SmolLM2-135M's shape with
random weights in W4A8, on each kind of cache. One process, all in turns; the time over that with floats, medians.
Writes benchmarks/results/attention.json after each row.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lobcq_fx
from lobcq_fx import LobcqCache, LobcqConfig
from lobcq_fx.benchmarking.machine import cpu_name
from lobcq_fx.benchmarking.race import median_ratio, race
from lobcq_fx.format import universal_codebooks
from lobcq_fx.kernels.bind import bind_cpu_core

RESULT = Path(__file__).parents[1] / "results" / "attention.json"
HEADS = {"9 heads on 3 of 64": (9, 3, 64), "32 heads on 8 of 128": (32, 8, 128)}
"""Query heads, heads of keys and values, and their width, by what the page calls them."""

CALLS = {"prompt of 512": (512, 512), "step after 128": (1, 128), "step after 2048": (1, 2048)}
"""Queries, and tokens that the last of them looks at."""

CACHES: dict[str, Callable[[], Any]] = {
    "floats": DynamicCache,
    "W4A16": LobcqCache,
    "W4A8": partial(LobcqCache, attention="w4a8"),
}
"""By what their keys and values are multiplied as."""


@torch.inference_mode()
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    assert bind_cpu_core(), "the CPU core was not built, or is switched off"
    found: dict[str, Any] = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= {"machine": platform.machine(), "command": "python -m benchmarks.cpu.attention", "rows": []}
    for name, call, contenders in races():
        together = 20 if name in HEADS and CALLS[call][0] == 1 else 1
        found["rows"].append({"of": name, "call": call} | _times(contenders, arguments.rounds, together))
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found["rows"][-1]), flush=True)


def races() -> Iterator[tuple[str, str, dict[str, Callable[[], object]]]]:
    """What is measured, in which call, and the contenders."""
    for name, sizes in HEADS.items():
        for call, (queries, tokens) in CALLS.items():
            yield name, call, alone(sizes, queries, tokens)
    for call, contenders in in_a_model().items():
        yield "a model", call, contenders


def _times(contenders: dict[str, Callable[[], object]], rounds: int, together: int) -> dict[str, float]:
    """Of what reads LO-BCQ over what reads floats, so many calls at a time."""
    seconds = race({name: [call] * together for name, call in contenders.items()}, rounds)
    return {name: round(median_ratio(one, seconds["floats"]), 3) for name, one in seconds.items() if name != "floats"}


def alone(sizes: tuple[int, int, int], queries: int, tokens: int) -> dict[str, Callable[[], object]]:
    """Calls on one random layer.

    Raises:
        AssertionError: a result is not what torch makes of the decoded keys and values.
    """
    query_heads, heads, width = sizes
    generator, codebooks = torch.Generator().manual_seed(tokens), universal_codebooks(8)
    query = 2 * torch.randn(1, query_heads, queries, width, generator=generator)
    states = [torch.randn(1, heads, tokens, width, generator=generator) for _ in range(2)]
    mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]
    rows = [torch.ops.lobcq.quantize_states(one, codebooks, 64) for one in states]
    numbers = (heads, width, 64, 64, width**-0.5)
    calls: dict[str, Callable[[], Tensor]] = {
        "floats": partial(functional.scaled_dot_product_attention, query, *states, mask, enable_gqa=True),
        "W4A16": partial(torch.ops.lobcq.attention, query, *rows, codebooks, mask, *numbers),
        "W4A8": partial(torch.ops.lobcq.attention, query, *rows, codebooks, mask, *numbers, in_int8=True),
    }
    decode = partial(torch.ops.lobcq.dequantize_states, codebooks=codebooks, heads=heads, width=width, array_size=64)
    decoded = [decode(one, dtype=torch.float32) for one in rows]
    expected = functional.scaled_dot_product_attention(query, *decoded, mask, enable_gqa=True)
    torch.testing.assert_close(calls["W4A16"](), expected, rtol=1e-4, atol=1e-4)
    assert (calls["W4A8"]() - expected).norm() < 0.03 * expected.norm()
    return dict(calls)


def in_a_model() -> dict[str, dict[str, Callable[[], object]]]:
    """Calls of one model: each prompt fills a new cache, each step is taken back afterwards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    q = lobcq_fx.quantize(model, config=LobcqConfig(mode="w4a8"), static_cache=False, inplace=True)
    ids = torch.randint(0, config.vocab_size, (1, 2048))

    def prompt(make: Callable[[], Any]) -> None:
        q(ids[:, :512], past_key_values=make(), logits_to_keep=1)

    def step(cache: Any) -> None:
        q(ids[:, :1], past_key_values=cache)
        cache.crop(-1)

    calls: dict[str, dict[str, Callable[[], object]]] = {
        "prompt of 512": {name: partial(prompt, make) for name, make in CACHES.items()}
    }
    for context in (128, 2048):
        steps = calls[f"step after {context}"] = {}
        for name, make in CACHES.items():
            cache = make()
            q(ids[:, :context], past_key_values=cache, logits_to_keep=1)
            steps[name] = partial(step, cache)
    return calls


if __name__ == "__main__":
    main()
