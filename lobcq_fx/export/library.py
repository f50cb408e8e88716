"""The op library for ONNX Runtime: the C++ CPU core of this installation, which has the ops of domain `lobcq`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from lobcq_fx.errors import LobcqError
from lobcq_fx.kernels.cpu.build import SUFFIX
from lobcq_fx.kernels.cpu.installed import SWITCH, cpu_core

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

LIBRARY_COPY = f"{'' if sys.platform == 'win32' else 'lib'}lobcq{SUFFIX}"
"""Name of the copy that goes with an exported model."""


_registered: WeakSet[SessionOptions] = WeakSet()
"""Options that have the ops. ONNX Runtime refuses sessions of those that were given them twice."""


def get_library_path() -> str:
    """The shared library, for `SessionOptions.register_custom_ops_library`.

    Raises:
        LobcqError: there is none.
    """
    core = cpu_core()
    if core is not None:
        return str(core.path)
    wanted = os.environ.get(SWITCH)
    if wanted == "0":
        raise LobcqError(f"the op library is switched off: unset {SWITCH}, which is 0")
    if wanted:
        raise LobcqError(f"the op library cannot be loaded from {wanted}: unset {SWITCH}, or give it a core's path")
    raise LobcqError("the op library was not built: reinstall lobcq_fx with a C++ compiler")


def is_available() -> bool:
    """Whether there is an op library."""
    return cpu_core() is not None


def register(session_options: SessionOptions) -> None:
    """Add the `lobcq` ops to a session's options, once however often it is called with them.

    Raises:
        LobcqError: there is no op library.
        RuntimeError: this ONNX Runtime is too old for it.
    """
    if session_options not in _registered:
        session_options.register_custom_ops_library(get_library_path())
        _registered.add(session_options)


def copy_library(folder: Path) -> str:
    """Put the library into a folder and return its name there; it needs nothing else, so it may travel.

    Raises:
        LobcqError: there is none.
    """
    shutil.copy(get_library_path(), folder / LIBRARY_COPY)
    return LIBRARY_COPY
