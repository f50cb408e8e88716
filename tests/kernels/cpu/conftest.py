"""The core, loaded once for each instruction set."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lobcq_fx.errors import ConfigError
from lobcq_fx.kernels.cpu.library import Core, torch_parallel_for

INSTRUCTION_SETS = (
    ("portable", "neon", "neon_i8mm") if platform.machine() in ("aarch64", "arm64") else ("portable", "avx2", "avx512")
)


@pytest.fixture(scope="session")
def load_core(core_file: Path) -> Callable[[str], Core]:
    """Loads the core for an instruction set. Each gets a file of its own: a library chooses once, when first called."""
    loaded: dict[str, Core] = {}

    def load(name: str) -> Core:
        if name not in loaded:
            copy = shutil.copy(core_file, core_file.with_name(f"liblobcq_{name}.so"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LOBCQ_CPU_ISA", name)
                try:
                    loaded[name] = Core(Path(copy), torch_parallel_for())
                except ConfigError as error:
                    pytest.skip(str(error))
        assert loaded[name].isa == name
        return loaded[name]

    return load


@pytest.fixture(scope="session", params=INSTRUCTION_SETS)
def core(request: pytest.FixtureRequest, load_core: Callable[[str], Core]) -> Core:
    return load_core(request.param)
