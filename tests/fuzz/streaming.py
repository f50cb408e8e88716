"""Kill `quantize_folder` at random moments, and go on: `python -m tests.fuzz.streaming --kills 60`."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
import transformers

import lobcq_fx
from lobcq_fx.storage.atomic_folder import MODEL, unfinished
from lobcq_fx.storage.journal import entries_of
from lobcq_fx.storage.weights_file import weights_files
from lobcq_fx.streaming import quantize_folder as whole
from lobcq_fx.streaming.emission import Emission, Outline
from lobcq_fx.streaming.skeleton import Skeleton
from lobcq_fx.streaming.together import JOURNAL
from lobcq_fx.streaming.transfer import Finished, _Transfer
from lobcq_fx.streaming.workers import WORKERS
from tests.fuzz.results import options, report

SETTINGS: dict[str, Any] = {"static_cache": False, "max_shard_size": "1MB"}
COUNTS = ("kills", "lost", "done again", "different", "finished", "gone on")
"""Kills; parameters of a journal that are not in its file; kills that left more to do again than there are workers;
folders that are not what they should be; kills that came too late; and those that left something to go on with."""


def main() -> None:
    given = options(__doc__, "kills", 60)
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        counts = crash(Path(folder), given.kills, given.seed)
    lost = counts["lost"] + counts["done again"] + counts["different"]
    report("streaming", tried=counts["kills"], lost=lost, record=given.record, gone_on=counts["gone on"])


def float_model(folder: Path, layers: int = 2) -> Path:
    """A language model of 7 weights a layer, each larger than what is read before it is encoded."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=4,
        pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10MB")
    return folder


@contextmanager
def traced_once() -> Iterator[None]:
    """Within, the first call's skeleton and graphs serve all: it is what comes after them that is killed."""
    known: dict[Callable[..., Any], Any] = {}

    def once(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if function not in known:
                known[function] = function(*arguments, **keywords)
            return known[function]

        return call

    with (
        patch.object(Skeleton, "of", once(Skeleton.of)),
        patch.object(Outline, "of", once(Outline.of)),
        patch.object(whole, "emit", once(whole.emit)),
    ):
        yield


def crash(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill processes that quantize one folder; each goes on with what the one before has done.

    After each, what its journal has must be in the file, and no more under way than a parameter for each worker.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source, expected, target = float_model(folder / "float"), folder / "expected", folder / "q"
    rng, counts = Random(seed), Counter(dict.fromkeys(COUNTS, 0))
    with traced_once():
        started = time.perf_counter()
        lobcq_fx.quantize_folder(source, expected, **SETTINGS)
        started = time.perf_counter()
        lobcq_fx.quantize_folder(source, expected, **SETTINGS)
        seconds = time.perf_counter() - started
        emission = whole.emit()
        while counts["kills"] < kills:
            begun = kill(source, target, rng.uniform(0, 1.5 * seconds), rng.choice([signal.SIGKILL, signal.SIGTERM]))
            counts["kills"] += 1
            if target.exists():
                counts["finished"] += 1
            else:
                kept = _kept(target, emission)
                counts["gone on"] += bool(kept)
                counts["lost"] += sum(not there for there in kept.values())
                counts["done again"] += len(begun - kept.keys()) > WORKERS
            if target.exists() or rng.random() < 0.2:
                lobcq_fx.quantize_folder(source, target, **SETTINGS)
                counts["different"] += contents(target) != contents(expected) or unfinished(target).exists()
                for one in target.iterdir():
                    one.unlink()
                target.rmdir()
    return counts


def kill(source: Path, target: Path, after: float, number: int) -> set[str]:
    """The parameters whose encoding a process had begun when it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        store = _Transfer._store

        def noting(self: _Transfer, name: str, parameter: torch.Tensor) -> None:
            os.write(writing, f"{name}\n".encode())
            store(self, name, parameter)

        try:
            with patch.object(_Transfer, "_store", noting):
                lobcq_fx.quantize_folder(source, target, **SETTINGS)
        finally:
            os._exit(0)  # and not up into the caller, which would clear up for two
    os.close(writing)
    time.sleep(after)
    os.kill(child, number)
    os.waitpid(child, 0)
    with os.fdopen(reading) as begun:
        return set(begun.read().split())


def _kept(target: Path, emission: Emission) -> dict[str, bool]:
    """The parameters of an unfinished folder's journal, and whether each is in the file as it says."""
    place = unfinished(target)
    entries = entries_of(place / JOURNAL)
    if not entries:
        return {}
    with weights_files(place / MODEL, emission.shards.files, emission.tensors) as files:
        return {
            name: all(files.digest(stored) == one.blake3 for stored, one in Finished.from_dict(entry).tensors.items())
            for name, entry in entries.items()
        }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


if __name__ == "__main__":
    main()
