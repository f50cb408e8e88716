"""Every call to the system that a save makes fails once: the old model stands, or the new one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("gcc") or shutil.which("cc")

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs a C compiler, and a loader that preloads"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    library = folder / "faults.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    command = [sys.executable, "-m", "tests.storage.faults", folder / "saved" / "q", folder / "found.json"]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def test_either_model_stands_with_the_notes_beside_it(found):
    assert len(found["faults"]) > 30
    assert {fault["notes"] for fault in found["faults"]} == {"mine"}
    assert found["left"] == []  # and what faults in clearing up have left, the next save clears up


def test_each_kind_of_call_failed_and_was_told_before_the_exchange(found):
    faults = found["faults"]
    assert {"fsync", "write", "renameat2"} <= {fault["failed"] for fault in faults}
    for fault in faults:
        if fault["after"] == fault["before"]:
            assert fault["raised"], fault  # who saved knows that it was for nothing
