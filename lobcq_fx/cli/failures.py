"""What can go wrong in a command, as exit codes and messages that name the remedy."""

from __future__ import annotations

import errno

import typer
from rich.markup import escape

from lobcq_fx.errors import ConfigError, LobcqError, RankError

UNEXPECTED, USAGE, BAD_INPUT, CANNOT_WRITE = 1, 2, 3, 4

EXIT_CODES = (
    "[bold]Exit codes:[/] 0 success · 1 unexpected error, or another process of a launch failed · "
    "2 wrong usage or settings · "
    "3 bad input: no folder, no model, no tokenizer, unsupported architecture, unusable text, no C++ core · "
    "4 cannot write: disk full, no permission, would overwrite"
)

# Depending on its release, typer brings its own click or imports the installed one: reach the class through typer.
CLICK_EXCEPTION: type[Exception] = typer.BadParameter.__mro__[2]

REPORT_IT = "run `lobcq --debug ...` for the traceback, and please report it"


class InputError(LobcqError):
    """A folder or file given to a command cannot be used."""


class OutputError(LobcqError):
    """A command cannot write where it was told to."""


def is_ours_to_explain(error: Exception) -> bool:
    """False for what typer handles: exits, aborts, usage errors, and a reader that closed our standard output."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return False
    return not isinstance(error, (typer.Exit, typer.Abort, CLICK_EXCEPTION))


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and message (rich markup) for an error that ended a command."""
    code, message = _explain(error)
    return code, escape(message)


def _explain(error: Exception) -> tuple[int, str]:
    text = str(error) or type(error).__name__
    match error:
        case ConfigError():
            return USAGE, text
        case OutputError():
            return CANNOT_WRITE, text
        case RankError():
            return UNEXPECTED, text
        case LobcqError():
            return BAD_INPUT, text
        case OSError():
            return CANNOT_WRITE, _explain_os_error(error)
        case MemoryError():
            return UNEXPECTED, "out of memory: close other programs, or take a machine with more"
        case RuntimeError() if "out of memory" in text or "can't allocate memory" in text:
            return UNEXPECTED, f"out of memory: {text.splitlines()[0]}"
    return UNEXPECTED, f"unexpected {type(error).__name__}: {text}; {REPORT_IT}"


def _explain_os_error(error: OSError) -> str:
    where = f" {error.filename2 or error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write{where}: the disk is full; free some space or write to another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write{where}: no permission; choose a place that is yours"
    return f"cannot write{where}: {error.strerror or error}"
