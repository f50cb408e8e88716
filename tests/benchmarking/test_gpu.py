"""benchmarks/gpu/measure.py, tried out on the CPU: every section runs, and nothing wrong gets a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.linears import check, measure_linear
from benchmarks.gpu.timing import race, summary
from lobcq_fx.benchmarking.contender import WrongProductError
from lobcq_fx.format import decode
from lobcq_fx.kernels.bind import weight_layout

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(weight_layout(CPU) is None, reason="the CPU core was not built")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gpu") / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu.measure", "--device", "cpu", "--smoke", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def test_every_section_has_results(smoke: Path) -> None:
    found = json.loads(smoke.read_text())
    assert found["smoke"]
    for section in ("few rows", "many rows"):
        (result,) = found[section]
        assert {"bf16", "W4A4 8x64", "W4A4 8x128", "W4A16 8x64"} <= result["times"].keys()
        assert result["times"]["bf16"]["times bf16"] == 1
    assert len(found["encoders"]) == 3
    (load,) = found["model"]["loads"]
    assert load["times"]["lobcq W4A4"]["step ms"] > 0
    assert found["model"]["weight_bytes"]["lobcq W4A4"] < found["model"]["weight_bytes"]["bf16"]


def test_the_plot_of_it(smoke: Path, tmp_path: Path) -> None:
    image = tmp_path / "plot.svg"
    command = [sys.executable, "-m", "benchmarks.gpu.plot", "--results", str(smoke), "-o", str(image)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert "<svg" in image.read_text()


def test_smoke_numbers_do_not_become_results() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.measure", "--device", "cpu", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs an --output of its own" in done.stderr


def test_what_computes_something_else_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the reference is what is wrong, by a hundredth of each operand."""
    monkeypatch.setattr("benchmarks.gpu.linears.decode", lambda encoded: 1.01 * decode(encoded))
    with pytest.raises(WrongProductError, match="w4a4 8x64: relative error"):
        next(measure_linear("tiny", (64, 128), (1,), 1, CPU))


def test_a_nan_is_no_product() -> None:
    with pytest.raises(WrongProductError, match="nan"):
        check("nobody", torch.full((2, 2), float("nan")), torch.ones(2, 2), 0.1)


def test_ratios_are_of_the_same_round() -> None:
    found = summary({"slow": [2.0, 8.0, 4.0], "fast": [1.0, 2.0, 2.0]}, "slow")
    assert found["fast"] == {"us": 2e6, "times slow": 2.0}
    times = race({"a": [lambda: None], "b": [lambda: None] * 3}, 4, CPU)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4}
