"""Compiles the C++ core to one shared library: `python -m lobcq_fx.kernels.cpu.build OUTPUT [--sanitize]`.

Each file by itself, as many at once as there are processors. No -march: each file names the instruction set it is for,
and the library chooses at run time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CORE = Path(__file__).parent / "core"

SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
"""Of a shared library."""

FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # Bit-exactness: no fused multiply-add but those written as such. The other two change no result.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wconversion",
)

GCC_FLAGS = (
    "-Wno-psabi",  # vector types in the signatures of internal functions
    # GCC 12's AVX-512 headers define undefined vectors by self-assignment and are then warned about.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)

SANITIZE_FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class BuildError(RuntimeError):
    """There is no C++ compiler, or it failed; the message has its output."""


def compile_core(output: Path, *, sanitize: bool = False, werror: bool = False) -> Path:
    """Compile the core.

    Args:
        output: the shared library to write; its folder must exist.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer, which a process that loads it must preload.
        werror: warnings are errors.

    Returns:
        output.

    Raises:
        BuildError: no compiler ($CXX, g++, clang++ or c++ in this order), or it failed.
    """
    compiler = find_compiler()
    flags = [*FLAGS, *([] if "clang" in Path(compiler).name else GCC_FLAGS)]
    flags += [*(SANITIZE_FLAGS if sanitize else ()), *(["-Werror"] if werror else [])]
    link = [*flags, "-shared"]
    if sys.platform == "linux" and not sanitize:
        # The C++ library's templates would be exported too, and bind to another library's copies.
        link += ["-Wl,--as-needed", "-Wl,-z,defs", f"-Wl,--version-script={CORE / 'exports.map'}"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = {source: f"{folder}/{source.stem}.o" for source in sorted(CORE.glob("*.cpp"))}
        commands = [[compiler, *flags, "-c", str(source), "-o", to] for source, to in objects.items()]
        list(threads.map(_run, commands))
        _run([compiler, *link, "-o", str(output), *objects.values(), "-ldl"])
    return output


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def find_compiler() -> str:
    """The C++ compiler to use.

    Raises:
        BuildError: there is none.
    """
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    for candidate in candidates:
        if path := shutil.which(candidate):
            return path
    raise BuildError(f"no C++ compiler: looked for {', '.join(candidates)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--sanitize", action="store_true")
    arguments = parser.parse_args()
    compile_core(arguments.output, sanitize=arguments.sanitize)


if __name__ == "__main__":
    main()
