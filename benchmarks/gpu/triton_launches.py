"""What the kernels' launchers launch, recorded rather than run, and compiled for any GPU on a machine that has none."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton._utils import canonicalize_dtype
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import constexpr

WARP = 32
ALIGNMENT = 16
"""Bytes, or units of an integer: what Triton specialises a kernel for."""

TOOLS = Path(nvidia.__file__).parent / "bin"
APPROXIMATIONS = ("div.full", "div.approx", "rcp.approx", "sqrt.approx", "rsqrt.approx")
MMA_IN_PTX = r"(?:wgmma\.mma_async|mma)\.sync\.aligned[\w.]*|tcgen05\.mma[\w.]*"
MMA_IN_SASS = r"\b(?:HGMMA|IGMMA|HMMA|IMMA|QGMMA|UTC\w*MMA)[\w.]*"


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, its arguments by name, and its options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    def constants(self) -> dict[str, int]:
        """The numbers among its compile-time constants."""
        names = [parameter.name for parameter in self.kernel.params if parameter.is_constexpr]
        return {name: self.arguments[name] for name in names if isinstance(self.arguments[name], int)}

    def source(self) -> ASTSource:
        """The kernel specialised for these arguments, as a launch would."""
        signature, constants, attributes = {}, {}, {}

        def specialized(value: Any, place: tuple[int, ...], constant: bool = False) -> Any:
            """The type of an argument at a place: its index, or its index and that inside a tuple."""
            if isinstance(value, tuple) and not constant:
                parts = tuple(specialized(part, (*place, i)) for i, part in enumerate(value))
                return type(value)(*parts) if hasattr(value, "_fields") else parts
            constant |= value is None or isinstance(value, constexpr) or (isinstance(value, int) and value == 1)
            if constant:
                constants[place] = value.value if isinstance(value, constexpr) else value
                return "constexpr"
            if isinstance(value, float):
                return "fp32"
            if isinstance(value, torch.Tensor):
                kind, alignment = f"*{canonicalize_dtype(value.dtype)}", value.storage_offset() * value.element_size()
            else:
                kind, alignment = "i32" if abs(value) < 2**31 else "i64", value
            if alignment % ALIGNMENT == 0:
                attributes[place] = [["tt.divisibility", ALIGNMENT]]
            return kind

        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            signature[parameter.name] = specialized(value, (i,), parameter.is_constexpr)
        return ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=attributes)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are appended to the list and nothing runs: tensors may be on the meta device."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        arguments.update({name: value for name, value in kwargs.items() if name in kernel.arg_names})
        launches.append(Launch(kernel, arguments, options, grid))

    run = triton.JITFunction.run
    triton.JITFunction.run = record
    try:
        yield launches
    finally:
        triton.JITFunction.run = run


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    """The launches of a call."""
    with recorded() as launches:
        call()
    return launches


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    """Compile for a compute capability (80, 90, 100, ...) down to machine code, and report what it needs.

    Returns:
        registers a thread, shared memory in bytes a program, spills in bytes of local memory a thread, the MMA
        instructions in PTX and in machine code, and how many instructions of machine code the longest loop has.
    """
    target = GPUTarget("cuda", capability, WARP)
    kernel = triton.compile(launch.source(), target=target, options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run(TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
        code = _run(TOOLS / "nvdisasm", "--print-code", cubin)
    counts = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    return {
        "kernel": launch.kernel.__name__,
        "sm": capability,
        "registers": counts["REG"],
        "shared_bytes": kernel.metadata.shared,
        "spilled_bytes": counts["STACK"] + counts["LOCAL"],
        "mma_ptx": sorted(set(re.findall(MMA_IN_PTX, kernel.asm["ptx"]))),
        "mma_sass": sorted(set(re.findall(MMA_IN_SASS, code))),
        "loop_instructions": longest_loop(code),
        "flushes_subnormals": ".ftz" in kernel.asm["ptx"],
        "approximate_division": any(name in kernel.asm["ptx"] for name in APPROXIMATIONS),
        "fused_multiply_adds": kernel.asm["ptx"].count("fma.rn.f32"),
        "options": {**launch.options, "grid": list(launch.grid)},
        "constants": launch.constants(),
    }


def longest_loop(code: str) -> int:
    """Instructions between the target of a backward branch and the branch, of the longest such loop; from nvdisasm."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = count
        elif re.match(r"\s*/\*[0-9a-f]+\*/\s+\S", line):
            count += 1
            branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
            if branch and branch[1] in labels:
                longest = max(longest, count - labels[branch[1]])
    return longest


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
