"""The core's shared library, compiled once a session."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lobcq_fx.kernels.cpu import library
from lobcq_fx.kernels.cpu.build import CORE, SUFFIX, BuildError, compile_core
from lobcq_fx.kernels.cpu.installed import SWITCH


@pytest.fixture(scope="session")
def core_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what LOBCQ_CPU_CORE names, or of the installed one; compiled here where its sources are newer."""
    output = tmp_path_factory.mktemp("core") / "liblobcq.so"
    installed = Path(library.__file__).with_name(f"_core{SUFFIX}")
    sources = [file.stat().st_mtime for file in CORE.iterdir()]
    if given := os.environ.get(SWITCH):
        return Path(shutil.copy(given, output))
    if installed.exists() and installed.stat().st_mtime > max(sources):
        return Path(shutil.copy(installed, output))
    try:
        return compile_core(output, werror=True)
    except BuildError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
