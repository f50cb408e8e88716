"""What the core refuses, repacking and back, and what the shared library exports and needs."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lobcq_fx.errors import ConfigError
from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.cpu import build
from lobcq_fx.kernels.cpu.library import Core, CoreError
from lobcq_fx.kernels.cpu.operands import CMatrix, KernelActivation
from tests.format.cases import ALL_SPECS, EVERY_SPEC
from tests.kernels.cpu.operands import codebooks, packed, weight
from tests.sweeps import crossed

CORRUPT, UNKNOWN_ISA, OTHER_WEIGHT = 4, 7, 8


@pytest.mark.parametrize(("spec", "shape"), crossed(ALL_SPECS, [(1, 1), (37, 200), (20, 4200)]))
def test_unpacking_restores_every_byte(core: Core, spec: FormatSpec, shape: tuple[int, int]) -> None:
    w = weight(core, spec, *shape)
    back = core.unpack_weight(w.kernel)
    assert torch.equal(back.codes, w.encoded.codes)
    assert torch.equal(back.selectors, w.encoded.selectors)
    assert torch.equal(back.scales, w.encoded.scales.view(torch.uint8))


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda s: s.name)
def test_kernel_layout_is_no_larger_than_the_packed_bytes(core: Core, spec: FormatSpec) -> None:
    w = weight(core, spec, 128, 512)
    assert w.kernel.data.numel() <= 1.01 * w.encoded.nbytes + 256


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xB8, 0xFF])
def test_a_negative_or_nan_scale_is_refused(core: Core, byte: int) -> None:
    operand = packed(weight(core, FormatSpec(), 40, 300).encoded)
    operand.scales[17, 3] = byte
    with pytest.raises(CoreError, match="corrupt") as error:
        core.pack_weight(operand)
    assert error.value.status == CORRUPT


@pytest.mark.parametrize(("num_codebooks", "bit"), [(2, 2), (2, 7), (4, 4), (8, 6), (8, 7)])
def test_selector_bits_behind_the_last_block_are_refused(core: Core, num_codebooks: int, bit: int) -> None:
    operand = packed(weight(core, FormatSpec(num_codebooks, 16), 20, 16).encoded)  # 2 blocks
    core.pack_weight(operand)
    operand.selectors[19, -1] |= 1 << bit
    with pytest.raises(CoreError, match="corrupt"):
        core.pack_weight(operand)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda s: s.name)
def test_any_bytes_decode_and_load_without_leaving_the_tables(core: Core, spec: FormatSpec) -> None:
    w = weight(core, spec, 9, 200)
    generator = torch.Generator().manual_seed(3)
    noise = packed(w.encoded)
    for part in (noise.codes, noise.selectors, noise.scales):
        part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator))
    assert core.decode(w.tables, noise).shape == (9, 200)
    a = core.load_activation(w.tables, noise)
    assert core.linear(w.tables, w.kernel, a).shape == (9, 9)


@pytest.mark.parametrize(
    "books",
    [[[0] * 15 + [32]], [[-32] + [0] * 15], [[1, 0] + [2] * 14]],
    ids=["too large", "too small", "not sorted"],
)
def test_bad_codebooks_are_refused(core: Core, books: list[list[int]]) -> None:
    with pytest.raises(CoreError, match=r"\[-31, 31\], each codebook sorted"):
        core.tables(torch.tensor(books, dtype=torch.int8))


@pytest.mark.parametrize("num_codebooks", [3, 5, 32])
def test_formats_that_do_not_exist_are_refused(core: Core, num_codebooks: int) -> None:
    with pytest.raises(CoreError, match="num_codebooks must be 1, 2, 4, 8 or 16"):
        core.tables(torch.zeros(num_codebooks, 16, dtype=torch.int8))


def test_arguments_that_disagree_are_refused(core: Core) -> None:
    w = weight(core, FormatSpec(8, 64), 32, 256)
    other_columns = core.encode_activation(w.tables, torch.randn(2, 200), 64)
    other_array = core.encode_activation(w.tables, torch.randn(2, 256), 32)
    good = core.encode_activation(w.tables, torch.randn(2, 256), 64)
    other_tables = core.tables(codebooks(FormatSpec(4, 64)))
    misaligned = KernelActivation(torch.cat((good.data, good.data))[1:], 2, 256, 64, good.kind)
    nonsense = replace(w.tables, data=torch.zeros_like(w.tables.data))
    for tables, a in (
        (w.tables, other_columns),
        (w.tables, other_array),
        (w.tables, misaligned),
        (w.tables, replace(good, kind=3)),
        (other_tables, good),
        (nonsense, good),
    ):
        with pytest.raises(CoreError, match="argument"):
            core.linear(tables, w.kernel, a)


OTHERS = {
    "its own": ((32, 256), FormatSpec(8, 64)),
    "another array size": ((32, 256), FormatSpec(8, 128)),
    "other codebooks": ((32, 256), FormatSpec(4, 64)),
    "fewer rows in as many panels": ((31, 256), FormatSpec(8, 64)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_weight_that_was_packed_for_another_shape_or_format_is_refused(core: Core, case: str) -> None:
    """Where it has as many bytes, what it says of itself is all that tells."""
    (rows, columns), spec = OTHERS[case]
    w = weight(core, FormatSpec(8, 64), 32, 256)
    claimed = replace(weight(core, spec, rows, columns).kernel, rows=32, columns=256, spec=FormatSpec(8, 64))
    if claimed.data.numel() < w.kernel.data.numel():  # streams of less detail: as if its end had stayed where it was
        stamp, gap = claimed.data[-64:], w.kernel.data.numel() - claimed.data.numel()
        claimed = replace(claimed, data=torch.cat((claimed.data[:-64], torch.zeros(gap, dtype=torch.uint8), stamp)))
    claimed = replace(claimed, data=claimed.data[: w.kernel.data.numel()])
    a = core.encode_activation(w.tables, torch.randn(2, 256), 64)
    if case == "its own":
        core.linear(w.tables, claimed, a)
        core.unpack_weight(claimed)
        return
    for call in (lambda: core.linear(w.tables, claimed, a), lambda: core.unpack_weight(claimed)):
        with pytest.raises(CoreError, match="packed for another shape or format") as error:
            call()
        assert error.value.status == OTHER_WEIGHT


@pytest.mark.parametrize("byte", range(32))
def test_every_byte_of_a_weights_stamp_counts(core: Core, byte: int) -> None:
    w = weight(core, FormatSpec(), 32, 256)
    w.kernel.data[-64 + byte] ^= 1
    with pytest.raises(CoreError, match="packed for another shape or format"):
        core.unpack_weight(w.kernel)


@pytest.mark.parametrize(
    ("spec", "shape"),
    crossed(ALL_SPECS, [(2**16, 2**15), (2**16, 2**15 - 1), (3, 2**31 + 1), (2**31 + 1, 3), (2**20, 2**20)]),
)
def test_sizes_of_more_elements_than_32_bits_count(core: Core, spec: FormatSpec, shape: tuple[int, int]) -> None:
    """Against Python's integers, which do not overflow; nothing is computed."""
    rows, columns = shape
    panels = -(-rows // 16)
    kernel_columns = -(-columns // max(64, spec.array_size)) * max(64, spec.array_size)
    streams = (kernel_columns // 2, kernel_columns // 8 * spec.selector_bits // 8, kernel_columns // spec.array_size)
    least = panels * 16 * sum(streams)
    assert 0 <= core._weight_bytes(rows, columns, spec) - least <= 3 * 64
    activation_bytes = core._lib.lobcq_activation_bytes
    arguments = (ctypes.c_int64(rows), ctypes.c_int64(columns), spec.array_size)
    arrays, parts = kernel_columns // spec.array_size, max(1, spec.array_size // 64)
    stride = (kernel_columns // 64 | 1) * 64
    least = rows * (stride + 4 * arrays + 4 * arrays * parts) + 4 * rows
    assert 0 <= activation_bytes(*arguments, 0) - least <= 4 * 64
    assert activation_bytes(*arguments, 2) == activation_bytes(*arguments, 0)
    assert activation_bytes(*arguments, 1) > least


@pytest.mark.parametrize(
    "shape", [(2**20 + 1, 2**20), (2**41, 1), (1, 2**41), (2**63 - 1, 2**63 - 1), (2**32, 2**32), (-1, 4), (4, -1)]
)
def test_sizes_that_no_memory_has_are_refused(core: Core, shape: tuple[int, int]) -> None:
    rows, columns = shape
    assert core._weight_bytes(rows, columns, FormatSpec()) == -1
    sizes = (ctypes.c_int64(rows), ctypes.c_int64(columns))
    assert core._lib.lobcq_activation_bytes(*sizes, 64, 0) == -1
    data = torch.zeros(64)
    matrix = CMatrix(data.data_ptr(), rows, columns, abs(columns), 0)
    scale, bad = torch.zeros(1), (ctypes.c_int64 * 2)()
    assert core._lib.lobcq_tensor_scale(ctypes.byref(matrix), ctypes.c_void_p(scale.data_ptr()), bad) == 1


def test_rows_that_lie_beyond_any_memory_are_refused(core: Core) -> None:
    data, scale, bad = torch.zeros(64), torch.zeros(1), (ctypes.c_int64 * 2)()
    matrix = CMatrix(data.data_ptr(), 2**32, 1, 2**32, 0)
    assert core._lib.lobcq_tensor_scale(ctypes.byref(matrix), ctypes.c_void_p(scale.data_ptr()), bad) == 1


@pytest.mark.parametrize("name", ["avx3", "", "AVX2"])
def test_an_instruction_set_that_does_not_exist_is_refused(
    core_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("LOBCQ_CPU_ISA", name)
    copy = Path(shutil.copy(core_file, tmp_path / "liblobcq.so"))
    with pytest.raises(ConfigError, match=f"^LOBCQ_CPU_ISA is '{name}', this CPU runs: (\\w+, )*portable$"):
        Core(copy)
    books, tables = codebooks(FormatSpec()), torch.zeros(2**16, dtype=torch.uint8)
    library = ctypes.CDLL(str(copy))
    pointers = (ctypes.c_void_p(books.data_ptr()), 8, ctypes.c_void_p(tables.data_ptr()))
    assert library.lobcq_tables_init(*pointers) == UNKNOWN_ISA


def test_columns_that_fill_no_block_array_are_not_rotated(core: Core) -> None:
    x, tables = torch.randn(2, 100), core.tables(codebooks(FormatSpec()))
    for call in (
        lambda: core.rotate(x, 64),
        lambda: core.rotate(x, 20),
        lambda: core.encode_activation(tables, x, 64, rotated=True),
        lambda: core.encode_activation(None, x, 64, rotated=True),
    ):
        with pytest.raises(CoreError):
            call()


def test_matrices_that_the_core_cannot_read_are_refused(core: Core) -> None:
    tables = core.tables(codebooks(FormatSpec()))
    cube, double = torch.zeros(2, 3, 4), torch.zeros(2, 8, dtype=torch.float64)
    transposed, repeated = torch.zeros(8, 6).t(), torch.zeros(1, 8).expand(4, 8)
    for bad in (cube, double, transposed, repeated):
        with pytest.raises(ValueError, match=r"pass a CPU matrix|must be contiguous"):
            core.encode(tables, bad, 64)


def test_operands_that_the_core_would_misread_are_refused(core: Core) -> None:
    """The core gets addresses alone: what they lead to is checked before."""
    w = weight(core, FormatSpec(), 32, 256)
    x, operand = torch.randn(4, 256), packed(w.encoded)
    a = core.encode_activation(w.tables, x, 64)
    short = replace(w.kernel, data=w.kernel.data[:-64])
    refused: dict[str, Callable[[], object]] = {
        "tensor_scale is torch.bfloat16": lambda: core.decode(
            w.tables, replace(operand, tensor_scale=operand.tensor_scale.bfloat16())
        ),
        r"tensor_scale is torch.float32 \(3, 1\)": lambda: core.encode(w.tables, x, 64, torch.ones(3, 1)),
        r"tensor_scale is torch.float32 \(1, 1\)": lambda: core.encode_activation(w.tables, x, 64, torch.ones(1, 1)),
        "scales is torch.float8_e4m3fn": lambda: core.pack_weight(replace(operand, scales=w.encoded.scales)),
        r"codes is .* with strides \(0, 0\)": lambda: core.pack_weight(
            replace(operand, codes=operand.codes[:1, :1].expand_as(operand.codes))
        ),
        "codes is .* on meta": lambda: core.pack_weight(replace(operand, codes=operand.codes.to("meta"))),
        r"bias is torch.float32 \(31,\)": lambda: core.linear(w.tables, w.kernel, a, torch.ones(31)),
        r"kernel layout is torch.uint8 \(\d+,\)": lambda: core.linear(w.tables, short, a),
        "the weight in kernel layout is": lambda: core.unpack_weight(short),
        "codebooks is torch.int32": lambda: core.tables(codebooks(FormatSpec()).int()),
        r"codebooks is torch.int8 \(8, 15\)": lambda: core.tables(codebooks(FormatSpec())[:, :15]),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=f"{message}.*: expected contiguous"):
            call()


def test_exports_only_its_own_names_and_links_no_framework(core_file: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reads ELF files")
    symbols = subprocess.run(["nm", "-D", "--defined-only", core_file], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in symbols.stdout.splitlines()}
    if "asan" in _needed(core_file):
        pytest.skip("a sanitizer adds names and libraries")
    headers = "".join((build.CORE / name).read_text() for name in ("lobcq.h", "lobcq_torch.h", "lobcq_ort.h"))
    assert names == set(re.findall(r"^LOBCQ_API .*?(\w+)\(", headers, re.MULTILINE))
    assert not {word for word in ("torch", "onnx", "omp") if word in _needed(core_file)}


def _needed(library: Path) -> str:
    result = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True)
    return "\n".join(line for line in result.stdout.splitlines() if "NEEDED" in line)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler: looked for no-such-compiler"):
        build.compile_core(tmp_path / "lib.so")
