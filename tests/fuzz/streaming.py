"""Kill `quantize_folder` at random moments, and go on: `python -m tests.fuzz.streaming --kills 60`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
import transformers
from safetensors import SafetensorError, safe_open

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.observation import Observed
from lobcq_fx.pipeline import Progress
from lobcq_fx.storage.atomic_folder import MODEL, unfinished
from lobcq_fx.storage.index import TensorDigest, digested
from lobcq_fx.storage.journal import entries_of
from lobcq_fx.streaming import calibrated
from lobcq_fx.streaming import quantize_folder as whole
from lobcq_fx.streaming.emission import Outline
from lobcq_fx.streaming.skeleton import Skeleton
from lobcq_fx.streaming.together import JOURNAL
from lobcq_fx.streaming.transfer import _Transfer
from lobcq_fx.streaming.workers import WORKERS
from tests.fuzz.results import options, report

SETTINGS: dict[str, Any] = {"static_cache": False, "max_shard_size": "1MB"}
LOSSES = ("not in files", "done again", "encoded twice", "different")
"""Entries of a journal whose tensors are not in their file; kills that left more to do again than may be under way;
what was encoded although it was there; folders that are not what they should be."""

COUNTS = ("kills", *LOSSES, "finished", "gone on")
"""Kills; those; kills that came too late; and those that left something to go on with."""

TERMINATED = 128 + signal.SIGTERM
"""How a process ends that SIGTERM has ended as an exception would."""


def main() -> None:
    given = options(__doc__, "kills", 60)
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        counts = crash(Path(folder), given.kills, given.seed)
    more = {name.replace(" ", "_"): counts[name] for name in (*LOSSES, "gone on")} | {"calibrated": given.kills // 2}
    lost = sum(counts[name] for name in LOSSES)
    report("streaming", tried=counts["kills"], lost=lost, record=given.record, **more)


def float_model(folder: Path, layers: int = 2) -> Path:
    """A language model of 7 weights a layer, each larger than what is read before it is encoded."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=4,
        pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10MB")
    return folder


def calibrating() -> dict[str, Any]:
    """Settings that need data, and two calls: six segments, and files for what calls hold between them."""
    ids = torch.randint(3, 1024, (2, 1, 32), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    return {**SETTINGS, "config": LobcqConfig.of_recipe("best"), "calibration_data": data, "max_memory": 100_000}


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
    """Kill processes that quantize a folder, in half of the kills with calibration data."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    counts = Counter(dict.fromkeys(COUNTS, 0))
    for name, settings, layers, share in (
        ("data-free", SETTINGS, 2, kills - kills // 2),
        ("calibrated", calibrating(), 1, kills // 2),
    ):
        (folder / name).mkdir()
        source = float_model(folder / f"float-{name}", layers)
        with traced_once():
            trace(source, folder / name / "traced", settings)
            counts.update(crash_one(source, folder / name, settings, share, seed))
    return counts


def trace(source: Path, target: Path, settings: Mapping[str, Any]) -> None:
    """End a call when it begins to work on weights: what processes are forked after this need not do again."""

    class _TracedError(Exception):
        pass

    def stop(step: str, *_: Any) -> None:
        if step in ("calibrate", "encode"):
            raise _TracedError

    with suppress(_TracedError):
        lobcq_fx.quantize_folder(source, target, **settings, progress=stop)
    assert not list(target.parent.iterdir()), "it was ended before there was anything to go on with"


def crash_one(source: Path, folder: Path, settings: Mapping[str, Any], kills: int, seed: int) -> Counter[str]:
    """Kill processes that quantize one folder; each goes on with what the one before has done.

    After each, what its journals have must be in files, and no more under way than a segment, or a parameter for each
    worker. What is lost goes to the standard error, with the kill, which the seed and its number choose.
    """
    expected, target = folder / "expected", folder / "q"
    counts, kept = Counter(dict.fromkeys(COUNTS, 0)), set[str]()
    started = time.perf_counter()
    run(source, expected, settings)
    seconds = time.perf_counter() - started
    while counts["kills"] < kills:
        rng = Random(f"{seed} {folder.name} {counts['kills']}")
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        after = rng.uniform(0, 1.5 * seconds)
        kill = (
            f"{folder.name} kill {counts['kills']} of seed {seed}, {number.name} {after:.3f} s into a work of"
            f" {seconds:.3f} s"
        )
        begun = run(source, target, settings, after, number)
        counts["kills"] += 1
        counts["encoded twice"] += _told(kill, "encoded twice", begun & kept)
        if target.exists():
            counts["finished"] += 1
            counts["different"] += bool(_told(kill, "different", differing(target, expected)))
            kept = set()
        else:
            noted = _noted(target)
            counts["not in files"] += _told(kill, "not in files", [name for name, there in noted.items() if not there])
            kept = {name for name, there in noted.items() if there}
            counts["gone on"] += bool(kept)
            if _too_many(begun - kept):
                counts["done again"] += bool(_told(f"{kill}, {len(kept)} kept", "done again", begun - kept))
        if target.exists() or rng.random() < 0.2:
            after_it = f"whole work after {kill}"
            counts["encoded twice"] += _told(after_it, "encoded twice", run(source, target, settings) & kept)
            left = [unfinished(target).name] if unfinished(target).exists() else []
            counts["different"] += bool(_told(after_it, "different", differing(target, expected) + left))
            for one in target.iterdir():
                one.unlink()
            target.rmdir()
            kept = set()
    return counts


def _told(kill: str, loss: str, names: Iterable[str]) -> int:
    """Say what of a kill is a loss, if anything is; how many names that are."""
    found = sorted(names)
    if found:
        sys.stderr.write(f"{kill}: {loss}: {', '.join(found)}\n")
    return len(found)


def run(
    source: Path, target: Path, settings: Mapping[str, Any], after: float | None = None, number: int = 0
) -> set[str]:
    """The parameters and segments whose encoding a process had begun when it ended, or was killed after some seconds.

    Raises:
        RuntimeError: it failed by itself.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # two threads that are the first to need torch's pool after a fork race for it
            with _noting(writing):
                lobcq_fx.quantize_folder(source, target, **settings)
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # and not up into the caller, which would clear up for two
    os.close(writing)
    if after is not None:
        time.sleep(after)
        os.kill(child, number)
    with os.fdopen(reading) as file:
        begun = set(file.read().splitlines())
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, *([-number, TERMINATED] if number else [])):
        raise RuntimeError("it failed by itself")
    return begun


@contextmanager
def _noting(descriptor: int) -> Iterator[None]:
    """Within, the name of each parameter and segment that begins to be encoded is written to a pipe."""
    store, piece = _Transfer._store, calibrated.Calibration._piece

    def storing(self: _Transfer, name: str, parameter: torch.Tensor) -> None:
        os.write(descriptor, f"{name}\n".encode())
        store(self, name, parameter)

    def encoding(self: calibrated.Calibration, part: Observed, progress: Progress) -> calibrated.Piece:
        os.write(descriptor, f"segment {part.index}\n".encode())
        return piece(self, part, progress)

    with patch.object(_Transfer, "_store", storing), patch.object(calibrated.Calibration, "_piece", encoding):
        yield


def _noted(target: Path) -> dict[str, bool]:
    """What an unfinished folder's journals have, and whether its tensors are in files as they say."""
    place, noted = unfinished(target), dict[str, bool]()
    for journal, folder in ((f"{calibrated.JOURNAL}-0", calibrated.PIECES), (JOURNAL, MODEL)):
        entries = entries_of(place / journal)
        found = _digests(place / folder) if entries else {}
        for name, entry in entries.items():
            digests = {stored: TensorDigest.from_dict(one) for stored, one in entry["tensors"].items()}
            noted[name] = digests.items() <= found.items()
    return noted


def _digests(folder: Path) -> dict[str, TensorDigest]:
    """Of all tensors of a folder's files, but for those that a kill has left in pieces."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with suppress(SafetensorError), safe_open(path, framework="pt") as file:
            found |= {name: digested(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return found


def _too_many(begun: set[str]) -> bool:
    segments = {name for name in begun if name.startswith("segment ")}
    return len(segments) > 1 or len(begun - segments) > WORKERS


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def differing(folder: Path, expected: Path) -> list[str]:
    """The names of files that only one of two folders has, or that are not the same in both."""
    found, wanted = contents(folder), contents(expected)
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


if __name__ == "__main__":
    main()
