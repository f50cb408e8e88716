"""The core's shared library, compiled once a session."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lobcq_fx.kernels.cpu.build import BuildError, compile_core
from lobcq_fx.kernels.cpu.installed import SWITCH


@pytest.fixture(scope="session")
def core_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled here, every warning an error; or a copy of the one that LOBCQ_CPU_CORE names."""
    output = tmp_path_factory.mktemp("core") / "liblobcq.so"
    if given := os.environ.get(SWITCH):
        return Path(shutil.copy(given, output))
    try:
        return compile_core(output, werror=True)
    except BuildError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
