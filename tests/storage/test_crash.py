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
def test_one_of_two_models_stands_after_every_kill():
    command = [sys.executable, "-m", "tests.fuzz.crash", "--kills", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)["crash"]
    assert (kills["tried"], kills["lost"]) == (6, 0)
