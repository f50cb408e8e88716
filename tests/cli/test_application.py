"""The application as a user starts it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lobcq_fx
from tests.cli.conftest import Run
from tests.cli.processes import fork, start

COMMANDS = ("quantize", "eval", "generate", "export", "report", "calibrate", "bench")


def test_help_names_the_commands_and_exit_codes() -> None:
    result = start("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert f"{command} " in result.stdout
    for words in ("2 wrong usage", "3 bad input", "4 cannot write", "--version", "--debug"):
        assert words in result.stdout


def test_help_does_not_load_torch() -> None:
    code = "import sys, lobcq_fx.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'matplotlib')))"
    root = str(Path(lobcq_fx.__file__).parents[1])
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, check=False).returncode
        == 0
    )


@pytest.mark.parametrize("command", [*sorted(set(COMMANDS) - {"export"}), "export onnx"])
def test_each_command_explains_itself(lobcq: Run, command: str) -> None:
    text = lobcq(*command.split(), "--help").stdout
    assert "--json" in text
    assert "Exit codes" in text


def test_version(lobcq: Run) -> None:
    assert lobcq("--version").stdout == f"lobcq {lobcq_fx.__version__}\n"


def test_a_failure_is_one_message_without_a_traceback() -> None:
    result = start("eval", "/no/such/folder")
    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("lobcq: there is no folder '/no/such/folder'")


def test_debug_shows_the_traceback() -> None:
    for result in (fork("--debug", "eval", "/no/such"), fork("eval", "/no/such", LOBCQ_DEBUG="1")):
        assert result.returncode == 1
        assert "Traceback" in result.stderr
        assert "InputError" in result.stderr


def test_wrong_usage(lobcq: Run) -> None:
    assert "No such option" in lobcq.refused("eval", "default", "--windw", "3", code=2)
    assert "Missing" in lobcq.refused("quantize", "default", code=2)
    assert "No such command" in lobcq.refused("quantise", code=2)
