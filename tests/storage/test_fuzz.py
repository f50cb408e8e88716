"""Damage at random: an error that says so, or a model that answers; `make fuzz` makes 200 times as much of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and limits")
def test_damaged_folders_are_refused_or_answer():
    command = [sys.executable, "-m", "tests.fuzz.loader", "--inputs", "500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)["loader"]
    assert counts["lost"] == 0
    assert counts["answered"] > 25
