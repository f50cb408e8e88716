"""Plain `generate()`, which is what users call, beside a loop written by hand that chooses the same tokens.

Neither is compiled. What the first takes longer is what transformers does around the calls of the model, and what the
model does for transformers alone. llama.cpp has its own loop, which is what its users call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.model.folders import LLAMA_CPP
from benchmarks.model.llama_cpp.client import LlamaCppModel
from benchmarks.model.torch_model import TorchModel
from lobcq_fx.benchmarking.generating import Generated, OtherTokensError, check_tokens, timed_generate
from lobcq_fx.benchmarking.race import median_ratio, take_turns

CALL, LOOP = "generate()", "loop"

Spans = list[tuple[float, float]]
"""Seconds until the first token, and of the rest, in each round."""


@torch.no_grad()
def race_generate(models: Mapping[str, Any], ids: Tensor, steps: int, rounds: int) -> dict[str, dict[str, Spans]]:
    """What `steps` tokens take after a prompt, by contender and by `CALL` and, of torch's, `LOOP`.

    Args:
        models: Hugging Face's and ours, and llama.cpp's, by contender.
        ids: the prompt, [1, T].
        steps: tokens to generate.
        rounds: times that each is measured.
    """
    ways: dict[tuple[str, str], Callable[[], Generated]] = {}
    for name, model in models.items():
        if isinstance(model, LlamaCppModel):
            ways[name, CALL] = partial(model.generate, ids, steps)
        else:
            ways[name, CALL] = partial(timed_generate, model, ids, steps)
            ways[name, LOOP] = partial(_loop, TorchModel(model, compiled=False), ids, steps)
    expected = {name: ways.get((name, LOOP), ways[name, CALL])().tokens for name in models}

    def turn(way: tuple[str, str]) -> tuple[float, float]:
        found = ways[way]()
        try:
            check_tokens(" ".join(way), found.tokens, expected[way[0]])
        except OtherTokensError as error:
            raise SystemExit(str(error)) from error
        return found.first_seconds, found.rest_seconds

    times = take_turns({"\n".join(way): way for way in ways}, rounds, turn)
    return {name: {way: times[f"{name}\n{way}"] for one, way in ways if one == name} for name in models}


def generate_columns(
    times: Mapping[str, Mapping[str, Spans]], name: str, base: str, length: int, steps: int
) -> dict[str, Any]:
    """A contender's tokens a second, how many times as fast as `base`, and how many times as long as its own loop.

    Of a prompt of `length` tokens ("prefill", until the first new token), of the new ones behind that ("decode"), and
    new ones over all seconds; "x" a llama.cpp contender: how many times as fast as that.
    """
    spans = times[name][CALL]
    seconds, (first, rest) = _totals(spans), zip(*spans, strict=True)
    columns = {
        "generate_tokens_per_second": steps / statistics.median(seconds),
        "generate_ratio": median_ratio(_totals(times[base][CALL]), seconds),
        "generate_prefill_tokens_per_second": length / statistics.median(first),
        "generate_decode_tokens_per_second": (steps - 1) / statistics.median(rest),
    }
    for other, title in ((base, "ratio"), *((one, f"x_{one}") for one in LLAMA_CPP if one in times)):
        others = zip(*times[other][CALL], strict=True)
        for what, theirs, own in zip(("prefill", "decode"), others, (first, rest), strict=True):
            columns[f"generate_{what}_{title}"] = median_ratio(theirs, own)
    if LOOP in times[name]:
        columns["generate_to_loop"] = median_ratio(seconds, _totals(times[name][LOOP]))
    return columns


def _totals(spans: Spans) -> list[float]:
    return [first + rest for first, rest in spans]


def _loop(model: TorchModel, ids: Tensor, steps: int) -> Generated:
    """The same by hand, with the cache that the model makes for itself."""
    start = time.perf_counter()
    logits, cache = model.step(ids, None)
    tokens = [logits.argmax(dim=-1)]
    first = time.perf_counter()
    for _ in range(steps - 1):
        logits, cache = model.step(tokens[-1][:, None], cache)
        tokens.append(logits.argmax(dim=-1))
    return Generated(torch.stack(tokens, dim=1), first - start, time.perf_counter() - first)
