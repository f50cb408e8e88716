"""Compile every Triton kernel for GPUs that need not be here, and write down what the compiler made of it.

    python -m benchmarks.gpu.triton_compile -o benchmarks/results/triton_compile.json

Exits with 1 where registers spill, where a kernel that encodes flushes subnormals, divides or takes roots approximately
or, with a prologue, fuses a multiplication with an addition, or where a GEMM lacks the MMA instruction of its plan.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: kernels are to be compiled

import torch
import triton

from benchmarks.gpu.triton_launches import compiled, launches_of
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.kernels.triton.decode_gemm import decode_gemm
from lobcq_fx.kernels.triton.dequantize import dequantize
from lobcq_fx.kernels.triton.encode import encode_rows
from lobcq_fx.kernels.triton.encode_operand import encode_operand
from lobcq_fx.kernels.triton.grouped_gemm import Groups, grouped_gemm
from lobcq_fx.kernels.triton.lookup import Lookup
from lobcq_fx.kernels.triton.operands import LEAST_INTEGER_ARRAY, Activation, Epilogue, Linear
from lobcq_fx.kernels.triton.prefill_gemm import prefill_gemm
from lobcq_fx.kernels.triton.prologues import AddRmsNorm, LayerNorm, Prologue, RmsNorm, SiluMul
from lobcq_fx.kernels.triton.weight_layout import WeightTiles, num_panels, num_tiles, tile_bytes

CAPABILITIES = (80, 90, 100)
FORMATS = ("1x16", "2x128", "2x64", "4x64", "8x64", "8x128", "16x64", "16x128", "16x32")
"""The paper's, and the one with the least of everything."""

ROWS, COLUMNS, OUTPUTS, MANY_OUTPUTS = 4096, 4096, 4096, 28672
"""A linear of Llama-3-8B; and its gate and up, of so many outputs that K is not split for few rows."""

LEAST_ROWS, FEW_ROWS, EXPERTS = 8, 16, 64
ENCODED = ("int8 entries", "fp16 scaled entries")
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

TALL = ("many rows", "groups in tall tiles")
"""What the names of kernels begin with that multiply 64 rows or more at a time."""

MANY_ROWS_MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
OPERANDS_IN_SASS = {"int8 entries": "I", "fp16 scaled entries": "H"}
"""IMMA, IGMMA and UTCIMMA multiply integers; HMMA, HGMMA and UTCHMMA 16-bit floats."""

Call = Callable[[], Any]


def main() -> None:
    """Compile, write the results, and complain."""
    arguments = parse_arguments()
    torch.set_default_device("meta")
    results = []
    for name in arguments.formats:
        wanted = [
            (what, call)
            for what, call in calls(FormatSpec.from_name(name))
            if any(part in what for part in arguments.only)
        ]
        for what, call in wanted:
            for launch in launches_of(call):
                for capability in arguments.capabilities:
                    results.append({"format": name, "what": what, **compiled(launch, capability)})
        print(f"{name}: {sum(result['format'] == name for result in results)} kernels compiled", flush=True)
    if arguments.output:
        shape = {"many_rows": ROWS, "few_rows": FEW_ROWS, "outputs": [OUTPUTS, MANY_OUTPUTS], "columns": COLUMNS}
        found = {"triton": triton.__version__, "shape": shape, "results": results}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failures = [f"{r['format']} {r['what']} sm_{r['sm']}: {text}" for r in results for text in complaints(r)]
    sys.exit("\n".join(failures) if failures else 0)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--capabilities", nargs="+", type=int, default=CAPABILITIES)
    parser.add_argument("--only", nargs="+", default=("",), help="parts of the names of what to compile")
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def calls(spec: FormatSpec) -> Iterator[tuple[str, Call]]:
    """What each launcher is asked for in a format, with calls that do it."""
    lookup, x = meta_lookup(spec), torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    for name, prologue in prologues().items():
        yield f"{name}encode", partial(encode_rows, x, lookup, spec, None, prologue)
        for form in ENCODED:
            integers = form == ENCODED[0]
            if not integers or spec.array_size >= LEAST_INTEGER_ARRAY:
                for rotated, how in ((False, ""), (True, "rotated ")):
                    call = partial(encode_operand, x, lookup, spec, None, integers, prologue, rotated)
                    yield f"{name}encode {how}to {form}", call
                    if spec.num_codebooks == 8:  # it reads no codebooks
                        call = partial(encode_operand, x, None, spec, None, integers, prologue, rotated)
                        yield f"{name}encode {how}in int8 to {form}", call
    yield "decode to bf16", partial(dequantize, *parts(spec), lookup.codebooks, spec, COLUMNS, torch.bfloat16)
    for form, a in activations(spec, LEAST_ROWS):
        yield f"at most 8 rows, {form}", gemm_call(decode_gemm, a, spec, MANY_OUTPUTS)
    for form, a in activations(spec, FEW_ROWS):
        yield f"few rows, {form}", gemm_call(decode_gemm, a, spec, MANY_OUTPUTS)
        if form == ENCODED[1]:
            yield f"few rows and outputs, {form}", gemm_call(decode_gemm, a, spec, OUTPUTS)
    for form, a in activations(spec, ROWS):
        yield f"many rows, {form}", gemm_call(prefill_gemm, a, spec, OUTPUTS)
    for rows, how in ((EXPERTS, "low"), (ROWS, "tall")):
        for form, a in activations(spec, rows):
            yield f"groups in {how} tiles, {form}", groups_call(a, spec)


def prologues() -> dict[str, Prologue | None]:
    """Every prologue, in bf16, with all that it may be given, by what its encoders' names begin with."""
    weight, bias = (torch.empty(COLUMNS, dtype=torch.bfloat16) for _ in range(2))
    second, sums = (torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16) for _ in range(2))
    norm = RmsNorm(weight, 1e-5)
    return {
        "": None,
        "RMSNorm, ": norm,
        "add, RMSNorm, ": AddRmsNorm(second, sums, norm),
        "LayerNorm, ": LayerNorm(weight, bias, 1e-5),
        "SiLU, multiply, ": SiluMul(second),
    }


def gemm_call(gemm: Callable[..., Any], a: Activation, spec: FormatSpec, outputs: int) -> Call:
    """A linear with a bias and a bf16 result."""
    epilogue = Epilogue(torch.empty(()), bias=torch.empty(outputs, dtype=torch.bfloat16))
    linear, codebooks = Linear(tiles(spec, outputs), outputs, epilogue), meta_lookup(spec).codebooks
    return partial(gemm, a, [linear], codebooks, spec, torch.bfloat16)


def groups_call(a: Activation, spec: FormatSpec) -> Call:
    """Experts, each for rows of its own, with a bf16 result."""
    matrix = num_panels(OUTPUTS) * num_tiles(COLUMNS) * sum(tile_bytes(spec))
    stack, scales = torch.empty(EXPERTS, matrix, dtype=torch.uint8), torch.empty(EXPERTS)
    groups = Groups(torch.empty(EXPERTS, dtype=torch.int32), torch.empty(2 * a.values.shape[0], dtype=torch.int64))
    return partial(grouped_gemm, a, stack, scales, groups, OUTPUTS, meta_lookup(spec).codebooks, spec, torch.bfloat16)


def meta_lookup(spec: FormatSpec) -> Lookup:
    """Tables of the right shapes."""
    with torch.device("cpu"):
        lookup = Lookup.of(universal_codebooks(spec.num_codebooks))
    return Lookup(*(table.to("meta") for table in (lookup.codebooks, lookup.entries, lookup.codes)))


def parts(spec: FormatSpec) -> tuple[torch.Tensor, ...]:
    """A weight as stored: codes, selectors, scales, tensor scale."""
    widths = (spec.code_bytes(COLUMNS), spec.selector_bytes(COLUMNS))
    codes, selectors = (torch.empty(OUTPUTS, width, dtype=torch.uint8) for width in widths)
    scales = torch.empty(OUTPUTS, spec.num_arrays(COLUMNS), dtype=torch.float8_e4m3fn)
    return codes, selectors, scales, torch.empty(())


def tiles(spec: FormatSpec, outputs: int) -> WeightTiles:
    """A weight in kernel layout."""
    size = num_panels(outputs) * num_tiles(COLUMNS) * sum(tile_bytes(spec))
    return WeightTiles.of(torch.empty(size, dtype=torch.uint8), spec, outputs, COLUMNS)


def activations(spec: FormatSpec, rows: int) -> Iterator[tuple[str, Activation]]:
    """Every form that a GEMM takes."""
    row_scales = torch.empty(rows, 1)
    if spec.array_size >= LEAST_INTEGER_ARRAY:
        scales = torch.empty(rows, spec.num_arrays(COLUMNS))
        yield ENCODED[0], Activation(torch.empty(rows, COLUMNS, dtype=torch.int8), scales, row_scales)
    yield ENCODED[1], Activation(torch.empty(rows, COLUMNS, dtype=torch.float16), None, row_scales)
    for name, dtype in FLOATS.items():
        yield name, Activation(torch.empty(rows, COLUMNS, dtype=dtype))


def complaints(result: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one kernel."""
    if result["spilled_bytes"]:
        yield f"spills {result['spilled_bytes']} bytes a thread"
    if result["flushes_subnormals"] or result["approximate_division"]:
        yield "flushes subnormals, or divides or takes roots approximately"
    if result["fused_multiply_adds"] and ", encode" in result["what"]:
        yield f"fuses {result['fused_multiply_adds']} multiplications with additions"
    if not result["kernel"].endswith("gemm_kernel"):
        return
    form = result["what"].rsplit(", ", 1)[1]
    expected = MANY_ROWS_MMA[result["sm"]] if result["what"].startswith(TALL) else "mma.sync"
    letter = OPERANDS_IN_SASS.get(form, "H")
    if not any(name.startswith(expected) for name in result["mma_ptx"]):
        yield f"has no {expected}, but {result['mma_ptx']}"
    if not all(name.removeprefix("UTC").startswith(letter) for name in result["mma_sass"]):
        yield f"multiplies with {result['mma_sass']}"


if __name__ == "__main__":
    main()
