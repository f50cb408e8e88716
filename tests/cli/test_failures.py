from __future__ import annotations

import errno
import os

import pytest
import torch
import typer

from lobcq_fx.cli.failures import InputError, OutputError, explain, is_ours_to_explain
from lobcq_fx.errors import CalibrationError, CheckpointError, ConfigError, TraceError


def os_error(number: int, path: str = "/out/model") -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("mode='w4a5': use one of ..."), 2, "w4a5"),
        (InputError("no folder"), 3, "no folder"),
        (TraceError("cannot trace Foo at foo.py:3"), 3, "foo.py:3"),
        (CalibrationError("no data"), 3, "no data"),
        (CheckpointError("damaged"), 3, "damaged"),
        (OutputError("exists"), 4, "exists"),
        (os_error(errno.ENOSPC), 4, "cannot write /out/model: the disk is full"),
        (os_error(errno.EDQUOT), 4, "the disk is full"),
        (os_error(errno.EACCES), 4, "no permission"),
        (os_error(errno.EROFS), 4, "no permission"),
        (os_error(errno.ENAMETOOLONG), 4, "File name too long"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "out of memory"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "unexpected ZeroDivisionError: division by zero; run `lobcq --debug",
        ),
    ],
)
def test_exit_code_and_message(error: Exception, code: int, words: str) -> None:
    found, message = explain(error)
    assert found == code
    assert words in message.replace("\\[", "[")


def test_a_message_is_not_taken_for_markup() -> None:
    assert explain(InputError("layer [bold]x[/bold]"))[1] == r"layer \[bold]x\[/bold]"


def test_what_typer_handles_is_left_to_it() -> None:
    for error in (typer.Exit(0), typer.Abort(), typer.BadParameter("no"), BrokenPipeError(errno.EPIPE, "broken")):
        assert not is_ours_to_explain(error)
    assert is_ours_to_explain(ValueError("x"))
