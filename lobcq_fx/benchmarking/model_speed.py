"""A language model of one's own, generating: what `lobcq bench --model` measures."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.benchmarking.generating import Generated, check_tokens, generate, timed_generate
from lobcq_fx.benchmarking.machine import cpu_name, installed_versions
from lobcq_fx.benchmarking.measure import Progress, torch_threads
from lobcq_fx.benchmarking.race import median_ratio, take_turns, timed_turn
from lobcq_fx.benchmarking.reading import MODEL_BYTES, READERS, read_rate, reading_bursts
from lobcq_fx.benchmarking.step_reads import bytes_of_a_step, bytes_of_states


@dataclass(frozen=True)
class Runner:
    """A model that generates.

    Args:
        name: in tables and results.
        model: with transformers' `generate()`.
        reads: whether its tensors are torch's, so that what a step reads can be counted.
    """

    name: str
    model: Any
    reads: bool = True


@dataclass(frozen=True)
class Load:
    """What is asked of each model: tokens of the prompt, new ones (two at least), rounds, threads of torch."""

    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int


@torch.no_grad()
def measure_models(runners: list[Runner], load: Load, progress: Progress) -> dict[str, Any]:
    """Let models generate in turns, through `generate()`; each from the same prompt of random tokens.

    Args:
        runners: the first is compared with the others.
        load: what to ask of them.
        progress: called as `progress("measure", turns done, turns)`.

    Returns:
        "cpu", "versions"; the fields of `load`; "load_average" of the last minute, "before" and "after";
        "read_gb_per_second", the fastest plain read of memory, in the same rounds; "results", for each model "model",
        "prefill_tokens_per_second" (of the prompt, until the first new token is there), "decode_tokens_per_second" (of
        those after it), "generate_tokens_per_second" (of the new ones, over all of it); "speedups", its time over the
        first model's in each of these; and, of torch's, "step_bytes", what a step reads of weights and of what is kept
        of the prompt, "roofline_tokens_per_second", for as many of which memory can be read, and "roofline_share".

    Raises:
        OtherTokensError: a model chose other tokens than in its first, untimed run.
    """
    ids = random_prompt(runners, load.prompt_tokens)
    before = os.getloadavg()[0]
    with torch_threads(load.threads):
        expected = {one.name: generate(one.model, ids, load.new_tokens) for one in runners}
        step_bytes = {one.name: _step_bytes(one.model, ids) for one in runners if one.reads}
        turns: dict[str, Callable[[], Any]] = {
            one.name: partial(_checked_turn, one, ids, load.new_tokens, expected[one.name]) for one in runners
        }
        turns |= {name: partial(timed_turn, burst) for name, burst in reading_bursts(MODEL_BYTES).items()}
        times = take_turns(turns, load.rounds, _counting(progress, load.rounds * len(turns)))
    rate = read_rate({name: times[name] for name in READERS}, MODEL_BYTES)
    return {
        "cpu": cpu_name(),
        "versions": installed_versions(),
        "threads": load.threads,
        "rounds": load.rounds,
        "prompt_tokens": load.prompt_tokens,
        "new_tokens": load.new_tokens,
        "load_average": {"before": before, "after": os.getloadavg()[0]},
        "read_gb_per_second": rate / 1e9,
        "results": [
            _result(one.name, times[one.name], times[runners[0].name], load)
            | _roofline(step_bytes.get(one.name), times[one.name], rate, load)
            for one in runners
        ],
    }


def random_prompt(runners: list[Runner], tokens: int) -> Tensor:
    """Ids that each of the models knows, int64 [1, tokens], always the same: speed does not depend on what they say."""
    vocabulary = min(one.model.config.get_text_config().vocab_size for one in runners)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, tokens), generator=generator, dtype=torch.int64, device="cpu")


def _step_bytes(model: Any, ids: Tensor) -> int:
    return bytes_of_a_step(model, ids) + bytes_of_states(model, ids)


def _checked_turn(runner: Runner, ids: Tensor, steps: int, expected: Tensor) -> Generated:
    found = timed_generate(runner.model, ids, steps)
    check_tokens(runner.name, found.tokens, expected)
    return found


def _counting(progress: Progress, turns: int) -> Callable[[Callable[[], Any]], Any]:
    """What takes a turn, and says how many were taken."""
    done = 0
    progress("measure", done, turns)

    def take(turn: Callable[[], Any]) -> Any:
        nonlocal done
        found = turn()
        done += 1
        progress("measure", done, turns)
        return found

    return take


def _result(name: str, own: list[Generated], first: list[Generated], load: Load) -> dict[str, Any]:
    return {
        "model": name,
        "prefill_tokens_per_second": load.prompt_tokens / statistics.median(one.first_seconds for one in own),
        "decode_tokens_per_second": (load.new_tokens - 1) / statistics.median(one.rest_seconds for one in own),
        "generate_tokens_per_second": load.new_tokens / statistics.median(one.seconds for one in own),
        "speedups": {
            "prefill": median_ratio([one.first_seconds for one in own], [one.first_seconds for one in first]),
            "decode": median_ratio([one.rest_seconds for one in own], [one.rest_seconds for one in first]),
            "generate": median_ratio([one.seconds for one in own], [one.seconds for one in first]),
        },
    }


def _roofline(step_bytes: int | None, own: list[Generated], rate: float, load: Load) -> dict[str, Any]:
    if step_bytes is None:
        return {}
    seconds = statistics.median(one.rest_seconds for one in own) / (load.new_tokens - 1)
    return {
        "step_bytes": step_bytes,
        "roofline_tokens_per_second": rate / step_bytes,
        "roofline_share": step_bytes / rate / seconds,
    }
