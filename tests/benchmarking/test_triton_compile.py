"""Kernels compiled for GPUs that are not here: no spills, and the MMA instructions of each plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.sweeps import sweep

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "triton_compile.json"

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(tmp_path: Path, only: str, kernels: int = 1) -> list[dict]:
    """The kernels of a name in one format, compiled afresh for three architectures."""
    output = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu.triton_compile", "--formats", "8x64", "--only", only, "-o", output]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    assert [result["sm"] for result in results] == [80, 90, 100] * kernels
    assert all(result["spilled_bytes"] == 0 for result in results)
    return results


@pytest.mark.parametrize(
    ("only", "instructions"),
    [
        ("many rows, int8 entries", ["mma.sync.aligned.m16n8k32", "wgmma.mma_async.sync.aligned.m64", "tcgen05.mma"]),
        pytest.param(
            *(
                "many rows, fp16 scaled",
                ["mma.sync.aligned.m16n8k16", "wgmma.mma_async.sync.aligned.m64", "tcgen05.mma"],
            ),
            marks=pytest.mark.nightly,
        ),
        ("few rows, int8 entries", ["mma.sync.aligned.m16n8k32"] * 3),
    ],
)
def test_mma_instructions(tmp_path: Path, only: str, instructions: list[str]) -> None:
    for result, instruction in zip(run(tmp_path, only), instructions, strict=True):
        (found,) = result["mma_ptx"]
        assert found.startswith(instruction)
        assert all(("I" if "int8" in only else "H") in name for name in result["mma_sass"])
        assert "int8" not in only or result["sm"] == 100 or ".s8.s8" in found


@pytest.mark.parametrize("only", sweep(["encode to int8", "encode rotated to int8"], ["encode to int8"]))
def test_encoding_divides_and_keeps_subnormals_as_ieee_asks(tmp_path: Path, only: str) -> None:
    """By itself, and after each of four prologues, whose operations are rounded one by one."""
    for result in run(tmp_path, only, kernels=5):
        assert not result["flushes_subnormals"]
        assert not result["approximate_division"]
        assert not (result["fused_multiply_adds"] and ", encode" in result["what"])


def test_the_committed_results_are_of_these_kernels_and_have_no_spills() -> None:
    results = json.loads(RESULTS.read_text())["results"]
    assert {result["sm"] for result in results} == {80, 90, 100}
    kernels = {path.stem for path in (ROOT / "lobcq_fx" / "kernels" / "triton").glob("*.py")}
    assert {result["kernel"].removesuffix("_kernel") for result in results} <= kernels | {"sum_splits"}
    assert not [result for result in results if result["spilled_bytes"]]
