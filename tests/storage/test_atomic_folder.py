"""replace_folder: the old folder or the new one, nothing in between."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.atomic_folder import replace_folder


def is_ours(folder):
    return (folder / "mark").exists()


def write(target, text, **more):
    with replace_folder(target, is_ours) as folder:
        (folder / "mark").write_text(text)
        for name, content in more.items():
            (folder / name).write_text(content)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_new_folder_with_its_parents(tmp_path):
    write(tmp_path / "a" / "b" / "new", "1")
    assert content(tmp_path / "a" / "b" / "new") == {"mark": "1"}
    assert leftovers(tmp_path / "a" / "b") == []


def test_a_failure_leaves_no_new_parents(tmp_path):
    (tmp_path / "old").mkdir()

    def fail():
        with replace_folder(tmp_path / "old" / "new" / "newer" / "q", is_ours) as folder:
            (folder / "mark").write_text("1")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "1")
    assert content(tmp_path / "empty") == {"mark": "1"}


def test_an_old_folder_is_replaced_and_its_other_files_carried_over(tmp_path):
    target = tmp_path / "q"
    write(target, "1", weights="old")
    (target / "tokenizer.json").write_text("t")
    (target / "notes").mkdir()
    (target / "notes" / "n.txt").write_text("n")
    write(target, "2", weights="new")
    assert content(target) == {"mark": "2", "weights": "new", "tokenizer.json": "t"}
    assert (target / "notes" / "n.txt").read_text() == "n"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_block_leaves_the_old_folder_whole(tmp_path, kind):
    target = tmp_path / "q"
    write(target, "1", weights="old")

    def interrupted():
        with replace_folder(target, is_ours) as folder:
            (folder / "mark").write_text("2")
            raise kind("half way")

    with pytest.raises(kind, match="half way"):
        interrupted()
    assert content(target) == {"mark": "1", "weights": "old"}
    assert leftovers(tmp_path) == []


def test_a_failing_second_rename_undoes_the_first(tmp_path, monkeypatch):
    target = tmp_path / "q"
    write(target, "1")
    rename = type(target).rename

    def failing(self, to):
        if str(self).endswith(".partial") and to == target:
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", failing)
    with pytest.raises(OSError, match="no"):
        write(target, "2")
    assert content(target) == {"mark": "1"}
    assert leftovers(tmp_path) == []


def test_files_and_foreign_folders_are_refused_untouched(tmp_path):
    (tmp_path / "file").write_text("f")
    with pytest.raises(CheckpointError, match="is a file: name a folder"):
        write(tmp_path / "file", "1")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(
        CheckpointError, match="holds files that are not a quantized model: choose a new or empty folder"
    ):
        write(foreign, "1")
    assert content(foreign) == {"thesis.txt": "years of work"}
    assert leftovers(tmp_path) == []


def test_a_link_stays_a_link_and_the_current_folder_has_a_name(tmp_path, monkeypatch):
    write(tmp_path / "real", "1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == {"mark": "2"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(type(tmp_path)("."), "3")
    assert content(tmp_path / "here") == {"mark": "3"}


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with replace_folder(tmp_path / "q", is_ours) as folder:
            (folder / "mark").write_text("1")
            (folder / "mark").chmod(0o600)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "q" / "mark").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "q").stat().st_mode) == 0o750


KILLED = """
import os, signal, sys
from pathlib import Path
from lobcq_fx.storage import atomic_folder
target, moment = Path(sys.argv[1]), sys.argv[2]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if moment != "block":
    setattr(atomic_folder, moment, die)
with atomic_folder.replace_folder(target, lambda folder: True) as folder:
    (folder / "mark").write_text("2")
    if moment == "block":
        die()
"""


def test_kill_9_of_a_real_process_leaves_the_old_folder_whole(tmp_path):
    """At every stage before the renames."""
    moments = ("block", "_carry_over", "_sync", "_swap")
    targets = [tmp_path / moment / "q" for moment in moments]
    for target in targets:
        write(target, "1", weights="old")
    command = [sys.executable, "-c", KILLED]
    processes = [subprocess.Popen([*command, target, m]) for target, m in zip(targets, moments, strict=True)]
    for process, target in zip(processes, targets, strict=True):
        assert process.wait() == -signal.SIGKILL
        assert content(target) == {"mark": "1", "weights": "old"}
        write(target, "3")  # and the next save works
        assert content(target) == {"mark": "3", "weights": "old"}
        shutil.rmtree(target.parent)
