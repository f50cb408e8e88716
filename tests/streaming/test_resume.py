"""quantize_folder goes on with what a call that did not end well has done; `make crash` kills sixty."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.errors import CheckpointError, LobcqError
from lobcq_fx.storage.atomic_folder import MODEL, resumed_folder, unfinished
from lobcq_fx.storage.journal import Journal, entries_of
from lobcq_fx.streaming.transfer import _Transfer
from tests.fuzz.streaming import SETTINGS, contents, float_model, traced_once

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A float model, and what becomes of it; traced once."""
    root = tmp_path_factory.mktemp("folders")
    float_model(root / "float")
    with traced_once():
        lobcq_fx.quantize_folder(root / "float", root / "expected", **SETTINGS)
        yield root


@pytest.fixture
def source(folders: Path, tmp_path: Path) -> Path:
    """A copy, with the times of the original."""
    shutil.copytree(folders / "float", tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def shard(source: Path) -> Path:
    """One of its files."""
    return sorted(source.glob("*.safetensors"))[1]


@pytest.fixture
def interrupted(source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a folder would be whose making failed after six parameters."""
    target = source.with_name("q")
    stop_after(6, monkeypatch, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(OSError, match="No space left on device"):
        lobcq_fx.quantize_folder(source, target, **SETTINGS)
    monkeypatch.undo()
    assert not target.exists()
    return target


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]) -> list[str]:
    """Let all but the first parameters fail; the names of those that were begun."""
    store, begun = _Transfer._store, list[str]()

    def failing(self: _Transfer, name: str, parameter: torch.Tensor) -> None:
        begun.append(name)
        if len(begun) > count:
            raise error()
        store(self, name, parameter)

    monkeypatch.setattr(_Transfer, "_store", failing)
    return begun


def shards_of(target: Path) -> list[Path]:
    found = sorted((unfinished(target) / MODEL).glob("*.safetensors"))
    assert len(found) > 2
    return found


def journal_of(target: Path) -> Path:
    return unfinished(target) / "journal"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nothing_is_lost_whenever_a_call_is_killed() -> None:
    command = [sys.executable, "-m", "tests.fuzz.streaming", "--kills", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["streaming"]
    assert (found["tried"], found["calibrated"], found["lost"]) == (5, 2, 0)


def test_the_next_call_does_the_rest(
    folders: Path, source: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = entries_of(journal_of(interrupted)).keys()
    begun = stop_after(1000, monkeypatch, AssertionError)
    lobcq_fx.quantize_folder(source, interrupted, **SETTINGS)
    assert len(kept) == 6
    assert not kept & {*begun}
    assert contents(interrupted) == contents(folders / "expected")
    assert not unfinished(interrupted).exists()


def test_what_did_not_reach_the_disk_is_done_again(
    folders: Path, source: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, name, last = entries_of(journal_of(interrupted))
    stored = next(iter(entries_of(journal_of(interrupted))[name]["tensors"]))
    weights = next(one for one in shards_of(interrupted) if f'"{stored}"'.encode() in one.read_bytes())
    content, lines = bytearray(weights.read_bytes()), journal_of(interrupted).read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin = 8 + length + json.loads(content[8 : 8 + length])[stored]["data_offsets"][0]
    content[begin] ^= 1
    weights.write_bytes(content)  # a page of a tensor
    journal_of(interrupted).write_bytes(lines[:-7])  # and the end of the journal
    begun = stop_after(1000, monkeypatch, AssertionError)
    lobcq_fx.quantize_folder(source, interrupted, **SETTINGS)
    assert {name, last} <= {*begun}
    assert contents(interrupted) == contents(folders / "expected")


def test_other_settings_or_files_do_not_go_on_with_it(source: Path, shard: Path, interrupted: Path) -> None:
    before = contents(unfinished(interrupted) / MODEL), journal_of(interrupted).read_bytes()
    with pytest.raises(CheckpointError, match=r"q.unfinished was begun with other settings, and stays .* or delete it"):
        lobcq_fx.quantize_folder(source, interrupted, LobcqConfig(mode="w4a16"), **SETTINGS)
    found = (shard).stat()
    os.utime(shard, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=rf"was begun with other {shard.name}, and stays"):
        lobcq_fx.quantize_folder(source, interrupted, **SETTINGS)
    os.utime(shard, ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"was begun with other max_shard_size"):
        lobcq_fx.quantize_folder(source, interrupted, **{**SETTINGS, "max_shard_size": "2MB"})
    (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"was begun with other config.json, and stays"):
        lobcq_fx.quantize_folder(source, interrupted, **SETTINGS)
    assert before == (contents(unfinished(interrupted) / MODEL), journal_of(interrupted).read_bytes())


def test_a_source_that_changes_meanwhile_is_noticed(source: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _Transfer._store

    def changing(self: _Transfer, name: str, parameter: torch.Tensor) -> None:
        store(self, name, parameter)
        (shard).touch()

    monkeypatch.setattr(_Transfer, "_store", changing)
    with pytest.raises(CheckpointError, match=rf"was changed while it was read: {shard.name}"):
        lobcq_fx.quantize_folder(source, source.with_name("q"), **SETTINGS)
    assert not source.with_name("q").exists()


def test_a_weight_that_is_no_number_is_named(source: Path, shard: Path) -> None:
    tensors = load_file(shard)
    name = next(one for one in tensors if "proj" in one)
    tensors[name][1, 2] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(LobcqError, match=rf"cannot encode {name}: .*\[1, 2\] is nan"):
        lobcq_fx.quantize_folder(source, source.with_name("q"), **SETTINGS)


def test_a_disk_that_is_full_at_once_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: .*lobcq-00001-of-\d+.safetensors"):
        lobcq_fx.quantize_folder(source, source.with_name("q"), **SETTINGS)
    assert [one.name for one in source.parent.iterdir()] == ["float"]


def test_two_calls_at_once_do_not_meet(source: Path) -> None:
    target = source.with_name("q")
    with (
        resumed_folder(target, lambda _: False, lambda _: False, lambda _: True),
        pytest.raises(CheckpointError, match="another process is writing"),
    ):
        lobcq_fx.quantize_folder(source, target, **SETTINGS)


def test_a_journal_is_what_reached_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, {"settings": 1})
    journal.add("a", {"value": 1.5})
    journal.close()
    for torn in (b"", b"\0" * 80, b"0123 {}\n", path.read_bytes().splitlines()[1]):
        with path.open("ab") as file:
            file.write(torn)
        journal = Journal(path, {"settings": 1})
        assert journal.entries == {"a": {"name": "a", "value": 1.5}}
        journal.close()
    with pytest.raises(CheckpointError, match="other settings"):
        Journal(path, {"settings": 2})
