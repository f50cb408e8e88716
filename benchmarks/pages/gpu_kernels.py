"""Put what was compiled, and the floors that can be computed, into docs/gpu_kernels.md, between its markers.

python -m benchmarks.pages.gpu_kernels           # rewrite the page
python -m benchmarks.pages.gpu_kernels --check   # exit with 1 if it differs
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.llama_linears import LINEARS
from benchmarks.pages.markdown import keep_page, table
from lobcq_fx.format import FormatSpec

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu_kernels.md"
RESULTS = ROOT / "benchmarks" / "results" / "triton_compile.json"
MEASURED = RESULTS.with_name("gpu.json")
"""What benchmarks/gpu/measure.py wrote on a GPU; not there until one has run it."""

NOT_MEASURED = "not measured"

BYTES_PER_SECOND, FP16_PER_SECOND, INT8_PER_SECOND = 4.8e12, 989e12, 1979e12
"""An H200 by its data sheet: memory bandwidth, and dense tensor-core operations (a multiply-add is two)."""

INSTRUCTIONS_PER_SECOND = 67e12 / 2
"""Instructions of single threads: by the same data sheet's fp32 rate, one multiply-add an instruction."""

SHOWN, SHOWN_SM = "8x64", 90
FEW_KERNELS = {8: "at most 8 rows, int8 entries", 16: "few rows, int8 entries"}
"""By rows that it multiplies, however many of them there are."""

TILE_WEIGHTS, WARP = 16 * 128, 32

FEW, MANY = (1, 16), 4096


def main() -> None:
    """Rewrite or check."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    sections = {
        "few": few_rows_floors(found),
        "many": many_rows_floors(),
        "compiled": compiled(found),
    }
    keep_page(PAGE, sections, "gpu_kernels", __doc__)


def instructions_per_weight(found: dict[str, Any], kernel: str, name: str = SHOWN, sm: int = SHOWN_SM) -> float:
    """Of the loop that reads the weight, for few rows: of a kernel, format and GPU."""
    wanted = (name, sm, kernel)
    (result,) = (r for r in found["results"] if (r["format"], r["sm"], r["what"]) == wanted)
    constants = result["constants"]
    turn = constants["PANELS"] * constants["UNROLL"] * TILE_WEIGHTS
    return result["loop_instructions"] * result["options"]["num_warps"] * WARP / turn


def few_rows_floors(found: dict[str, Any]) -> str:
    """What moving a linear's operands, and issuing the instructions that its weights take, last at least."""
    bits = FormatSpec.from_name(SHOWN).bits_per_scalar
    rows = []
    for name, (n, k) in LINEARS.items():
        for m in FEW:
            per_weight = instructions_per_weight(found, FEW_KERNELS[8 if m <= 8 else 16])
            ours, bf16 = (linear_bytes(m, n, k, size) for size in (bits, 16))
            times = (ours / BYTES_PER_SECOND, n * k * per_weight / INSTRUCTIONS_PER_SECOND, bf16 / BYTES_PER_SECOND)
            cells = [f"{seconds * 1e6:.1f}" for seconds in times]
            rows.append([name, f"{n} x {k}", str(m), f"{ours / 1e6:.1f}", *cells, measured("few rows", name, m)])
    header = ["linear", "N x K", "M", "MB", "bytes, us", "instructions, us", "bf16's bytes, us", "measured, us"]
    return f"{instructions_of_formats(found)}\n\n{table(header, rows)}"


def instructions_of_formats(found: dict[str, Any]) -> str:
    """Instructions a weight, of every format that has kernels for few rows on integers."""
    names = [n for n in dict.fromkeys(r["format"] for r in found["results"]) if not n.endswith("x16")]
    sms = sorted({result["sm"] for result in found["results"]})
    rows = []
    for name in names:
        of_sms = [[instructions_per_weight(found, kernel, name, sm) for kernel in FEW_KERNELS.values()] for sm in sms]
        rows.append([name, *(" / ".join(f"{value:.1f}" for value in values) for values in of_sms)])
    return table(["instructions a weight, up to 8 / 16 rows", *(f"sm_{sm}" for sm in sms)], rows)


def measured(section: str, linear: str, rows: int) -> str:
    """Microseconds of the W4A4 linear of the format shown, where a GPU has run it."""
    if not MEASURED.is_file():
        return NOT_MEASURED
    found = json.loads(MEASURED.read_text(encoding="utf-8")).get(section, [])
    times = [r["times"][f"W4A4 {SHOWN}"]["us"] for r in found if (r["linear"], r["rows"]) == (linear, rows)]
    return f"{times[0]:.1f}" if times else NOT_MEASURED


def linear_bytes(m: int, n: int, k: int, weight_bits: float) -> float:
    """A packed weight, a bf16 activation and a bf16 result, each moved once."""
    return n * k * weight_bits / 8 + 2 * m * (k + n)


def many_rows_floors() -> str:
    """What a linear's multiply-adds take at least."""
    rows = []
    for name, (n, k) in LINEARS.items():
        operations = 2 * MANY * n * k
        cells = [f"{operations / rate * 1e6:.0f}" for rate in (INT8_PER_SECOND, FP16_PER_SECOND)]
        rows.append([name, f"{n} x {k}", f"{operations / 1e12:.2f}", *cells, measured("many rows", name, MANY)])
    return table(["linear", "N x K", "1e12 operations", "int8 floor, us", "fp16 floor, us", "measured, us"], rows)


def compiled(found: dict[str, Any]) -> str:
    """Registers, shared memory and MMA instructions of each kernel: by architecture, the range over formats."""
    results = found["results"]
    architectures = sorted({result["sm"] for result in results})
    rows = []
    for what, kernel in dict.fromkeys((result["what"], result["kernel"]) for result in results):
        of_kind = [r for r in results if (r["what"], r["kernel"]) == (what, kernel)]
        each = [[r for r in of_kind if r["sm"] == sm] for sm in architectures]
        registers = " / ".join(span(r["registers"] for r in some) for some in each)
        shared = " / ".join(span(round(r["shared_bytes"] / 1024) for r in some) for some in each)
        mma = [", ".join(sorted({name for r in some for name in r["mma_sass"]})) for some in each]
        instructions = " / ".join(dict.fromkeys(mma)) or "none"
        spilled = str(max(r["spilled_bytes"] for r in of_kind))
        warps = span(r["options"]["num_warps"] for r in of_kind)
        rows.append([what, f"`{kernel.removesuffix('_kernel')}`", warps, registers, shared, spilled, instructions])
    formats = ", ".join(dict.fromkeys(result["format"] for result in results))
    names = " / ".join(f"sm_{sm}" for sm in architectures)
    header = ["what", "kernel", "warps", "registers", "shared, KB", "spilled", "MMA instruction"]
    return f"{names}, Triton {found['triton']}, formats {formats}.\n\n{table(header, rows)}"


def span(values: Iterable[int]) -> str:
    """Least to largest."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


if __name__ == "__main__":
    main()
