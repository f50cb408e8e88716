"""The core for Armv8, cross-compiled and emulated, through the tests that prove the other instruction sets.

No speed is measured here or anywhere: an emulator says nothing about one.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lobcq_fx.format import FormatSpec, encode
from lobcq_fx.kernels.cpu.build import CORE, compile_core
from lobcq_fx.kernels.cpu.library import CoreError
from tests.format.cases import matrix
from tests.kernels.cpu.emulated_core import EmulatedCore
from tests.kernels.cpu.operands import activation, codebooks, weight

# Imported here, these tests run with this file's fixture `core` too.
from tests.kernels.cpu.test_compensate import test_every_format as test_feedback_in_every_format  # noqa: F401
from tests.kernels.cpu.test_compensate import test_scales_at_both_ends_of_their_range  # noqa: F401
from tests.kernels.cpu.test_encode import (  # noqa: F401
    assert_same_bytes,
    test_a_static_scale_far_too_small_saturates_exactly,
    test_every_format,
    test_every_kind_of_values,
    test_golden_vectors,
    test_half_precision_inputs,
    test_non_finite_activations_mark_their_row_or_array,
    test_rotated,
    test_rows_may_be_strided,
    test_tensor_scale,
)
from tests.kernels.cpu.test_encode import test_fuzz as test_fuzz_encode  # noqa: F401
from tests.kernels.cpu.test_linear import (  # noqa: F401
    test_a_non_finite_row_gives_nan_and_disturbs_no_other,
    test_a_row_does_not_depend_on_its_neighbours,
    test_extreme_digits_do_not_overflow,
    test_extreme_entries_do_not_overflow,
    test_extreme_int8_entries_do_not_overflow,
    test_half_precision_in_and_out,
    test_output_rounding_over_the_whole_range,
    test_several_linears_share_an_activation_and_activation_codebooks_may_differ,
    test_split_keeps_its_precision_at_any_magnitude,
    test_w4a4,
    test_w4a8,
    test_w4a16,
)
from tests.kernels.cpu.test_linear import test_fuzz as test_fuzz_linear  # noqa: F401
from tests.kernels.cpu.test_refusals import (  # noqa: F401
    test_any_bytes_decode_and_load_without_leaving_the_tables,
    test_unpacking_restores_every_byte,
)
from tests.sweeps import sweep

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SERVER = Path(__file__).parent / "native" / "core_server.cpp"

FLUSH_TO_ZERO, ROUND_TOWARDS_ZERO = 1 << 24, 3 << 22
"""Bits of the floating-point control register."""

UNKNOWN_ISA = 7

Start = Callable[..., EmulatedCore]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts the core, compiled once, on a model of CPU, with LOBCQ_CPU_ISA where one is given.

    With less optimization than users have, which takes most of a compiler's time: what is exact does not depend on it.
    """
    for tool, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed (Debian's package {package})")
    folder = tmp_path_factory.mktemp("aarch64")
    with pytest.MonkeyPatch.context() as patch:
        compiler = folder / COMPILER
        compiler.write_text(f'#!/bin/sh\nexec "{shutil.which(COMPILER)}" "$@" -O1\n')
        compiler.chmod(0o755)
        patch.setenv("CXX", str(compiler))
        patch.delenv("LD_PRELOAD", raising=False)  # a sanitizer's runtime, meant for this process alone
        library = compile_core(folder / "liblobcq.so", werror=True)
        server = _compile_server(library)
        root = _target_root()
    emulator = str(shutil.which(EMULATOR))
    running: list[EmulatedCore] = []

    def start(cpu: str, isa: str | None = None) -> EmulatedCore:
        environment = {} if isa is None else {"LOBCQ_CPU_ISA": isa}
        running.append(EmulatedCore([emulator, "-cpu", cpu, "-L", root, str(server)], environment))
        return running[-1]

    yield start
    for core in running:
        core.close()


def _compile_server(library: Path) -> Path:
    server = library.with_name("core_server")
    flags = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wl,-rpath,$ORIGIN")
    subprocess.run([COMPILER, *flags, "-I", CORE, SERVER, library, "-o", server], check=True)
    return server


def _target_root() -> str:
    """The folder that stands for the target's root: its lib/ has the C library."""
    libc = subprocess.run([COMPILER, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True)
    return str(Path(libc.stdout.strip()).resolve().parents[1])


CPUS = {"neon_i8mm": "max", "neon": "neoverse-n1", "portable": "cortex-a72"}
"""Whose best instruction set it is: what a better one adds would be an illegal instruction there."""


@pytest.fixture(scope="session", params=sweep(CPUS, ["neon_i8mm", "neon"]))
def core(request: pytest.FixtureRequest, start: Start) -> EmulatedCore:
    core = start(CPUS[request.param])
    assert core.isa == request.param
    return core


@pytest.mark.parametrize(("cpu", "wanted"), [("max", "neon"), ("max", "portable"), ("neoverse-n1", "portable")])
def test_the_environment_chooses_among_what_the_cpu_runs(start: Start, cpu: str, wanted: str) -> None:
    assert start(cpu, wanted).isa == wanted


@pytest.mark.parametrize(("cpu", "wanted"), [("max", "avx2"), ("neoverse-n1", "neon_i8mm"), ("cortex-a72", "neon")])
def test_an_instruction_set_that_the_cpu_lacks_is_refused(start: Start, cpu: str, wanted: str) -> None:
    with pytest.raises(CoreError) as error:
        start(cpu, wanted).tables(codebooks(FormatSpec()))
    assert error.value.status == UNKNOWN_ISA


@pytest.mark.parametrize("array_size", [16, 64, 128])
def test_matrix_products_are_the_dot_products_bit_for_bit(start: Start, array_size: int) -> None:
    """Pairs of rows and rows that are left over, fused and through tiles; panels in pairs and one left over."""
    dots, matrices = start("max", "neon"), start("max", "neon_i8mm")
    w, x = weight(dots, FormatSpec(8, array_size), 44, 1100), activation(300, 1100)

    def products(core: EmulatedCore, x: torch.Tensor) -> list[torch.Tensor]:
        activations = (
            core.encode_activation(w.tables, x, array_size),
            core.encode_activation(None, x, array_size),
            core.split_activation(x, array_size),
        )
        return [core.linear(w.tables, w.kernel, a) for a in activations]

    for rows in (1, 2, 3, 4, 5, 6, 7, 300):
        for a, b in zip(products(dots, x[:rows]), products(matrices, x[:rows]), strict=True):
            assert torch.equal(a, b), rows


def test_the_callers_floating_point_mode_changes_nothing_and_is_kept(core: EmulatedCore) -> None:
    spec, x = FormatSpec(), torch.from_numpy(matrix("subnormal", 3, 256, seed=2))
    scale = torch.tensor(2.0**-140)
    w, tiny = weight(core, spec, 40, 300), activation(3, 300) * 1e-38

    def results() -> list[torch.Tensor]:
        packed = core.encode(w.tables, x, 64, scale)
        assert_same_bytes(packed, encode(x, spec, codebooks(spec), scale))
        products = (core.encode_activation(w.tables, tiny, 64), core.split_activation(tiny, 64))
        return [core.decode(w.tables, packed), *(core.linear(w.tables, w.kernel, a) for a in products)]

    expected = results()
    before = core.floating_point_mode(FLUSH_TO_ZERO | ROUND_TOWARDS_ZERO)
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
        assert core.floating_point_mode() == FLUSH_TO_ZERO | ROUND_TOWARDS_ZERO
    finally:
        core.floating_point_mode(before)
