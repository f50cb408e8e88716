"""Tuning, in Triton's interpreter: what is found is right, and is what launches then take."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files go; two candidates each, of which the second takes less time."""
    from benchmarks.gpu import tuning
    from lobcq_fx.kernels.triton import configs, tune

    def timer(run: object) -> float:
        (config,) = run.args
        return 2.0 if config in (configs.DecodeConfig(), configs.PrefillConfig()) else 1.0

    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "configs")
    monkeypatch.setattr(configs, "FOLDER", tmp_path / "configs")
    monkeypatch.setattr(tuning, "MANY", (20,))
    monkeypatch.setattr(tune, "decode_candidates", lambda _: [configs.DecodeConfig(), configs.DecodeConfig(panels=2)])
    monkeypatch.setattr(
        tune, "prefill_candidates", lambda _: [configs.PrefillConfig(), configs.PrefillConfig(tile_m=64)]
    )
    monkeypatch.setattr(tune.fastest, "__defaults__", (timer,))
    yield tmp_path / "configs"
    configs.forget()


def test_the_fastest_goes_into_the_file_and_into_launches(folder: Path) -> None:
    from benchmarks.gpu.tuning import tune
    from lobcq_fx.format import FormatSpec
    from lobcq_fx.kernels.triton.configs import Shape, decode_config, prefill_config

    *_, found = tune({"a": (40, 200)}, ["8x64", "8x128"], 1000, CPU)
    assert json.loads((folder / found["file"]).read_text()) == json.loads(found["configurations"])
    assert set(found["milliseconds"].values()) == {1.0}
    assert {key.split()[0] for key in found["milliseconds"]} == {"1", "4", "16", "32"}
    assert decode_config(Shape(4, 40, 256, FormatSpec(8, 64), torch.int8), CPU).panels == 2
    assert prefill_config(Shape(32, 40, 256, FormatSpec(8, 128), torch.int8), CPU).tile_m == 64


def test_what_was_found_before_stays_and_what_fails_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.tuning import tune

    *_, before = tune({"a": (40, 200)}, ["8x128"], 1000, CPU)
    assert list(tune({"a": (40, 200)}, ["8x64"], -1, CPU)) == []
    monkeypatch.setattr("benchmarks.gpu.tuning._product", lambda *_: torch.zeros(()))
    *_, after = tune({"a": (40, 200)}, ["8x64"], 1000, CPU)
    assert after["milliseconds"] == {}
    assert len(after["failed"]) == 4
    assert all("is off by" in reason for reason in after["failed"].values())
    assert after["configurations"] == before["configurations"]
