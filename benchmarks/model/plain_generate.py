"""Plain `generate()`, which is what users call, beside a loop written by hand that chooses the same tokens.

Neither is compiled. What the first takes longer is what transformers does around the calls of the model, and what the
model does for transformers alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.model.torch_model import TorchModel
from lobcq_fx.benchmarking.race import median_ratio, race

CALL, LOOP = "generate()", "loop"


@torch.no_grad()
def race_generate(models: Mapping[str, Any], ids: Tensor, steps: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds that `steps` tokens take after a prompt, by contender and by `CALL` and `LOOP`.

    Args:
        models: Hugging Face's and ours, by contender.
        ids: the prompt, [1, T].
        steps: tokens to generate.
        rounds: times that each is measured.
    """
    ways: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for name, model in models.items():
        ways[name, CALL] = partial(_generate, model, ids, steps)
        ways[name, LOOP] = partial(_loop, TorchModel(model, compiled=False), ids, steps)
        chosen, expected = (ways[name, way]().tolist() for way in (CALL, LOOP))
        if chosen != expected:
            raise SystemExit(f"{name}: generate() chose {chosen}, the loop {expected}, so no speed for it")
    times = race({f"{name}\n{way}": [call] for (name, way), call in ways.items()}, rounds)
    return {name: {way: times[f"{name}\n{way}"] for way in (CALL, LOOP)} for name in models}


def generate_columns(
    times: Mapping[str, Mapping[str, list[float]]], name: str, base: str, steps: int
) -> dict[str, Any]:
    """A contender's tokens a second, how many times as fast as `base`, and how many times as long as its own loop."""
    seconds = times[name][CALL]
    return {
        "generate_tokens_per_second": steps / statistics.median(seconds),
        "generate_ratio": median_ratio(times[base][CALL], seconds),
        "generate_to_loop": median_ratio(seconds, times[name][LOOP]),
    }


def _generate(model: Any, ids: Tensor, steps: int) -> Tensor:
    """The new tokens [steps]."""
    tokens: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, eos_token_id=None
    )
    return tokens[0, ids.shape[1] :]


def _loop(model: TorchModel, ids: Tensor, steps: int) -> Tensor:
    """The same."""
    logits, cache = model.prefill(ids)
    tokens = [logits.argmax()]
    for _ in range(steps - 1):
        logits, cache = model.step(tokens[-1].view(1, 1), cache)
        tokens.append(logits.argmax())
    return torch.stack(tokens)
