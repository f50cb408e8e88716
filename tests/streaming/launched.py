"""What torchrun launches: `torchrun ... -m tests.streaming.launched FOLDER`; each rank writes down what it saw."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.cli import app
from lobcq_fx.observation import Observed
from lobcq_fx.pipeline import Progress
from lobcq_fx.storage.atomic_folder import unfinished
from lobcq_fx.storage.journal import Journal, entries_of
from lobcq_fx.streaming import ranks, skeleton, watch
from lobcq_fx.streaming.calibrated import Calibration, Piece
from lobcq_fx.streaming.transfer import _Transfer
from tests import traces
from tests.fuzz.streaming import SETTINGS, traced_once

RANK = int(os.environ.get("RANK", 0))


def quantize(root: Path, name: str, source: str = "float", **settings: Any) -> str:
    """Into a folder; the error, or how many layers the inventory has."""
    try:
        found = lobcq_fx.quantize_folder(root / source, root / name, **{**SETTINGS, **settings})
    except (lobcq_fx.errors.LobcqError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{len(found.quantized)} layers"


def of_several(root: Path) -> dict[str, Any]:
    """By three ranks, by two of them, and by one, whose place torchrun's variables say; and what they refuse."""
    said: dict[str, Any] = {}
    steps: list[tuple[str, int, int | None]] = []
    said["three"] = quantize(root, "three", progress=lambda *step: steps.append(step))
    said["steps"] = steps
    with patch.dict(os.environ, {"WORLD_SIZE": "2"}):
        said["two"] = quantize(root, "two") if RANK < 2 else str(next(ranks._works))  # calls are counted
    with patch.dict(os.environ, {"WORLD_SIZE": "1"}):
        said["one"] = quantize(root, "one") if RANK == 0 else None
    said["other settings"] = quantize(root, "other", config=LobcqConfig(mode="w4a16") if RANK == 2 else None)
    said["another folder"] = elsewhere(root)
    said["a full disk"] = full(root)
    said["slow"] = slow(root)
    said["silent"] = silent(root)
    torch.distributed.init_process_group("gloo")
    said["group"] = quantize(root, "group")
    torch.distributed.destroy_process_group()
    said["command"] = command(root)
    said["not a number"] = quantize(root, "nan", "float-nan")
    return said


def calibrated(root: Path) -> dict[str, Any]:
    """The same with calibration data, of which one of three ranks gets none; and by one what three have begun."""
    said = {"three": quantize(root, "calibrated-three", "tiny", **calibrating())}
    with patch.dict(os.environ, {"WORLD_SIZE": "2"}):
        two = quantize(root, "calibrated-two", "tiny", **calibrating()) if RANK < 2 else str(next(ranks._works))
    with full_after(1):
        said |= {"two": two, "a full disk": quantize(root, "calibrated-full", "tiny", **calibrating())}
    with patch.dict(os.environ, {"WORLD_SIZE": "1"}):
        return said | (resumed(root) if RANK == 0 else {})


def resumed(root: Path) -> dict[str, list[str]]:
    """The segments that journals have, and those that are encoded then."""
    kept = {one for path in unfinished(root / "calibrated-full").glob("journal*") for one in entries_of(path)}
    piece, encoded = Calibration._piece, list[str]()

    def noting(self: Calibration, part: Observed, progress: Progress) -> Piece:
        encoded.append(f"segment {part.index}")
        return piece(self, part, progress)

    with patch.object(Calibration, "_piece", noting):
        quantize(root, "calibrated-full", "tiny", **calibrating())
    return {"kept": sorted(kept), "encoded": encoded}


def calibrating() -> dict[str, Any]:
    """Settings that need data, and two calls."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (2, 12), generator=generator) for _ in range(2)]
    data = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    return {"config": LobcqConfig.of_recipe("best"), "calibration_data": data, "max_memory": 1000}


def elsewhere(root: Path) -> str:
    """One rank has another disk under the name of the output."""
    (root / f"disk-{RANK % 2}").mkdir(exist_ok=True)
    with patch("lobcq_fx.streaming.together.APPEARS", 0.3):
        return quantize(root, f"disk-{RANK % 2}/q")


def full(root: Path) -> str:
    """The disk of one rank is full after two parameters; then it is not."""
    with full_after(2):
        return quantize(root, "full")


@contextlib.contextmanager
def full_after(entries: int) -> Iterator[None]:
    """Within, the disk of rank 1 is full once its journals have so many entries."""
    add, count = Journal.add, iter(range(100))

    def adding(self: Journal, name: str, entry: Any) -> None:
        if RANK == 1 and next(count) >= entries:
            raise OSError(28, "No space left on device", "some/disk")
        add(self, name, entry)

    with patch.object(Journal, "add", adding):
        yield


def slow(root: Path) -> str:
    """One rank is later than any sign of life may be late; it gives them all the same."""
    store, count = _Transfer._store, iter(range(100))

    def late(self: _Transfer, name: str, parameter: torch.Tensor) -> None:
        time.sleep(3 if RANK == 1 and next(count) == 1 else 0)
        store(self, name, parameter)

    with patch.object(_Transfer, "_store", late), patch.object(watch, "SILENT", 2), patch.object(watch, "EVERY", 0.1):
        return quantize(root, "slow")


def silent(root: Path) -> str:
    """One rank stands still, as a machine that is gone."""
    store, give = _Transfer._store, watch.Watch._give

    def still(self: _Transfer, name: str, parameter: torch.Tensor) -> None:
        time.sleep(4 if RANK == 1 else 0)
        store(self, name, parameter)

    def giving(self: watch.Watch) -> None:
        if RANK != 1 or self._beats < 1:
            give(self)

    patches = patch.object(_Transfer, "_store", still), patch.object(watch.Watch, "_give", giving)
    with patches[0], patches[1], patch.object(watch, "SILENT", 2), patch.object(watch, "EVERY", 0.1):
        return quantize(root, "silent")


def command(root: Path) -> dict[str, Any]:
    """`lobcq quantize`, twice: the second time the folder is there."""
    found = {}
    for name in ("fresh", "taken"):
        out, messages = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
            try:
                app(["quantize", str(root / "float"), "-o", str(root / "command"), "--max-shard-size", "1MB", "--json"])
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
        found[name] = [code, out.getvalue(), messages.getvalue()]
    return found


def killed(root: Path) -> str:
    """The last rank is killed after three parameters; the others do theirs, and wait for it."""
    store, count = _Transfer._store, iter(range(100))

    def dying(self: _Transfer, name: str, parameter: torch.Tensor) -> None:
        store(self, name, parameter)
        if RANK == 2 and next(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(_Transfer, "_store", dying):
        return quantize(root, "killed")


def main(folder: str) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = Path(folder)
    with patch.object(skeleton, "SMALL", 1024), traces.traced_once():
        (root / f"calibrated-{RANK}.json").write_text(json.dumps(calibrated(root)))
    with traced_once():
        (root / f"several-{RANK}.json").write_text(json.dumps(of_several(root)))
        (root / f"killed-{RANK}.json").write_text(json.dumps(killed(root)))


if __name__ == "__main__":
    main(*sys.argv[1:])
