"""replace_folder: the old folder or the new one, nothing in between."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

import lobcq_fx
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage import atomic_folder
from lobcq_fx.storage.atomic_folder import replace_folder
from lobcq_fx.storage.terminations import terminations_unwind


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

    monkeypatch.setattr(atomic_folder, "exchange", lambda *_: False)
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
    """At every stage before the exchange."""
    moments = ("block", "_give_permissions", "_keep_the_rest", "_sync", "_put_in_place")
    targets = [tmp_path / moment / "q" for moment in moments]
    for target in targets:
        write(target, "1", weights="old")
    command = [sys.executable, "-c", KILLED]
    processes = [subprocess.Popen([*command, target, m]) for target, m in zip(targets, moments, strict=True)]
    for process, target in zip(processes, targets, strict=True):
        assert process.wait() == -signal.SIGKILL
        assert content(target) == {"mark": "1", "weights": "old"}
        assert atomic_folder.leftovers(target)
        write(target, "3")  # and the next save works, and clears up
        assert content(target) == {"mark": "3", "weights": "old"}
        assert leftovers(target.parent) == []


# A shell's background and nohup start programs that ignore two of these, the tests among them.
SAVING = """
import signal, sys, time
from pathlib import Path
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from lobcq_fx.storage.atomic_folder import replace_folder
with replace_folder(Path(sys.argv[1]), lambda folder: True) as folder:
    (folder / "mark").write_text("2")
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def saving(target):
    command = [sys.executable, "-c", SAVING, target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_process_that_is_asked_to_end_leaves_nothing(tmp_path, number):
    target = tmp_path / "q"
    write(target, "1")
    with saving(target) as process:
        process.send_signal(number)
        assert process.wait(30) in (128 + number, -number)
    assert content(target) == {"mark": "1"}
    assert leftovers(tmp_path) == []


DROPPING = """
import os, signal, sys, time, weakref
from lobcq_fx.storage.terminations import terminations_unwind
signal.signal(signal.SIGTERM, signal.SIG_DFL)
watched = {1, 2}
callback = weakref.ref(watched, lambda _: os.kill(os.getpid(), signal.SIGTERM))
with terminations_unwind():
    try:
        del watched
        print("dropped", flush=True)
        time.sleep(60)
    finally:
        print("cleared up", flush=True)
"""


def test_a_termination_that_comes_in_a_callback_is_not_lost():
    done = subprocess.run([sys.executable, "-c", DROPPING], capture_output=True, text=True, timeout=30)
    assert done.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert done.stdout == "dropped\ncleared up\n"
    assert done.stderr == ""


def test_a_handler_of_the_program_s_own_stays():
    taken = []
    before = signal.signal(signal.SIGTERM, lambda *_: taken.append(1))
    try:
        with terminations_unwind():
            signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with terminations_unwind():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert taken == [1]


def test_a_save_that_still_runs_keeps_its_folder(tmp_path):
    target = tmp_path / "q"
    with saving(target):
        (running,) = atomic_folder.leftovers(target)
        write(target, "3")
        assert running.is_dir()
        assert content(target) == {"mark": "3"}


def test_a_model_that_made_way_for_one_that_never_came_is_back(tmp_path, monkeypatch, caplog):
    target = tmp_path / "q"
    write(target, "1", notes="mine")
    monkeypatch.setattr(atomic_folder, "exchange", lambda *_: False)
    target.rename(tmp_path / ".q.abc.old")
    with pytest.raises(CheckpointError, match=r"is no folder: .*A save that was killed has left .*\.q\.abc\.old"):
        lobcq_fx.load(target)
    write(target, "2")
    assert content(target) == {"mark": "2", "notes": "mine"}
    assert "it is back" in caplog.text
    assert leftovers(tmp_path) == []


def test_what_is_left_of_a_target_with_a_longer_name_is_its_own(tmp_path):
    write(tmp_path / "q.v2", "1")
    (tmp_path / "q.v2").rename(tmp_path / ".q.v2.abc.old")
    (tmp_path / ".q.v2.abc.partial").mkdir()
    assert atomic_folder.leftovers(tmp_path / "q") == []
    write(tmp_path / "q", "2")
    assert content(tmp_path / "q") == {"mark": "2"}
    assert len(atomic_folder.leftovers(tmp_path / "q.v2")) == 2
    write(tmp_path / "q.v2", "3")
    assert leftovers(tmp_path) == []


def test_nobody_clears_up_while_a_model_makes_way(tmp_path, monkeypatch):
    write(tmp_path / "q", "1")
    seen, rename = [], type(tmp_path).rename

    def look(self, to):
        seen.append(atomic_folder._is_locked(tmp_path))
        return rename(self, to)

    monkeypatch.setattr(atomic_folder, "exchange", lambda *_: False)
    monkeypatch.setattr(type(tmp_path), "rename", look)
    write(tmp_path / "q", "2")
    assert seen == [True, True]
    assert not atomic_folder._is_locked(tmp_path)


def test_what_is_not_ours_stays_as_it_is(tmp_path):
    target = tmp_path / "q"
    write(target, "1", weights="old")
    (target / "token.key").write_text("secret")
    (target / "token.key").chmod(0o600)
    (target / "run.sh").write_text("#!/bin/sh")
    (target / "run.sh").chmod(0o755)
    (target / "link").symlink_to("token.key")
    (target / "dangling").symlink_to("/nowhere/at/all")
    (target / "private").mkdir(0o700)
    (target / "private" / "inner").write_text("i")
    os.mkfifo(target / "pipe")
    target.chmod(0o2750)
    before = {path: path.lstat() for path in target.rglob("*") if path.name not in ("mark", "private")}
    write(target, "2", weights="new")
    for path, was in before.items():
        if path.name != "weights":
            assert path.lstat() == os.stat_result((*was[:9], path.lstat()[9])), path  # all but the time of its change
    assert str((target / "dangling").readlink()) == "/nowhere/at/all"
    assert stat.S_IMODE((target / "private").stat().st_mode) == 0o700
    assert stat.S_IMODE(target.stat().st_mode) == 0o2750
    assert (target / "weights").read_text() == "new"


def test_at_no_time_is_the_folder_missing(tmp_path):
    target = tmp_path / "q"
    write(target, "0")
    seen, done = set(), threading.Event()

    def look():
        while not done.is_set():
            seen.add((target / "mark").read_text())

    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(look)
        for number in range(1, 40):
            write(target, str(number))
        done.set()
        looking.result()  # FileNotFoundError, had it been missing
    assert len(seen) > 1


@pytest.mark.parametrize("way", ["dangling", "file", "inside", "itself", "foreign"])
def test_what_cannot_be_written_is_refused_beforehand(tmp_path, way):
    source = tmp_path / "source"
    source.mkdir()
    (source / "thesis").write_text("t")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("f")
    target, message = {
        "dangling": (tmp_path / "dangling", "is a link to .*nowhere, which is not there"),
        "file": (tmp_path / "file", "is a file"),
        "inside": (source / "a" / "b", "is in .*source, which is read from"),
        "itself": (source, "holds files that are not a quantized model"),
        "foreign": (source, "holds files that are not a quantized model"),
    }[way]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        atomic_folder.check_target(target, is_ours, source if way in ("inside", "itself") else None)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
        atomic_folder.check_target(tmp_path / "q", is_ours)
