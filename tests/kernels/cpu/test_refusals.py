"""What the core refuses, repacking and back, and what the shared library exports and needs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.cpu import build
from lobcq_fx.kernels.cpu.library import Core, CoreError
from lobcq_fx.kernels.cpu.operands import KernelActivation
from tests.format.cases import ALL_SPECS
from tests.kernels.cpu.operands import codebooks, packed, weight

CORRUPT = 4


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(1, 1), (37, 200), (20, 4200)], ids=str)
def test_unpacking_restores_every_byte(core: Core, spec: FormatSpec, shape: tuple[int, int]) -> None:
    w = weight(core, spec, *shape)
    back = core.unpack_weight(w.kernel)
    assert torch.equal(back.codes, w.encoded.codes)
    assert torch.equal(back.selectors, w.encoded.selectors)
    assert torch.equal(back.scales, w.encoded.scales.view(torch.uint8))


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
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


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
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
        (w.tables, replace(good, kind=2)),
        (other_tables, good),
        (nonsense, good),
    ):
        with pytest.raises(CoreError, match="argument"):
            core.linear(tables, w.kernel, a)


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
