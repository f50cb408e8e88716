"""The application as a user starts it, in a process of its own."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import lobcq_fx

SECONDS = 120
"""After which a command has hung."""

START = "import sys; sys.argv[0] = 'lobcq'; from lobcq_fx.cli import app; app()"
FORK = """
import json, os, signal, sys
from transformers import AutoModelForCausalLM
import lobcq_fx
from lobcq_fx.cli import app

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(int(sys.argv[1]))
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.environ.update(asked["environment"])
sys.argv = ["lobcq", *asked["arguments"]]
for number, place in enumerate((os.devnull, asked["stdout"], asked["stderr"])):
    os.dup2(os.open(place, os.O_RDWR), number)
app()
"""
"""A process that has imported what commands take, which is most of their time, forks for each that it reads."""


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process, imports and all."""
    command = [sys.executable, "-c", START, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**variables(), **environment}, check=False, timeout=SECONDS
    )


def fork(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own that has already imported torch, transformers and the package."""
    forking = forking_process()
    assert forking.stdin is not None
    assert forking.stdout is not None
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        asked = {
            "arguments": arguments, "environment": environment, "stdout": stdout.name, "stderr": stderr.name,
        }  # fmt: skip
        forking.stdin.write(json.dumps(asked) + "\n")
        forking.stdin.flush()
        code = int(forking.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())


@cache
def forking_process() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", FORK, str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=variables(),
    )
    atexit.register(process.communicate)
    return process


def variables() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(lobcq_fx.__file__).parents[1]), "COLUMNS": "200"}
