"""The core, loaded once for each instruction set."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lobcq_fx.kernels.cpu.library import Core, torch_parallel_for

INSTRUCTION_SETS = (
    ("portable", "neon") if platform.machine() in ("aarch64", "arm64") else ("portable", "avx2", "avx512")
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
                loaded[name] = Core(Path(copy), torch_parallel_for())
                assert loaded[name].isa  # the choice is made here, while the variable is set
        if loaded[name].isa != name:
            pytest.skip(f"this CPU does not run {name}")
        return loaded[name]

    return load


@pytest.fixture(scope="session", params=INSTRUCTION_SETS)
def core(request: pytest.FixtureRequest, load_core: Callable[[str], Core]) -> Core:
    return load_core(request.param)
