"""Saves that are killed at random moments lose nothing; `make crash` kills ten times as many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_of_two_models_stands_after_every_kill(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.crash", "--kills", "6", "--out", tmp_path / "counts.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert (counts["kills"], counts["lost"], counts["leftovers after the next save"]) == (6, 0, 0)
