from __future__ import annotations

import json
from pathlib import Path

import torch

import lobcq_fx
from lobcq_fx.format import FormatSpec, check_codebooks
from tests.cli.conftest import Run


def test_the_file_serves_quantize(lobcq: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "codebooks.json"
    arguments = ("--text", text_file, "--format", "4x64", "--samples", 8, "--length", 32)
    found = lobcq.json("calibrate", llama, "-o", file, *arguments)
    written = json.loads(file.read_text())
    codebooks = torch.tensor(written["codebooks"]["4"], dtype=torch.int8)
    check_codebooks(codebooks, FormatSpec(4, 64))
    assert written["model"] == "llama"
    assert written["text"] == "text.txt"
    assert found["blocks"] == written["blocks"] > 1000
    assert found["mse_fitted"] <= found["mse_start"]

    lobcq("quantize", llama, "-o", tmp_path / "q", "--format", "4x64", "--codebooks", file)
    assert torch.equal(lobcq_fx.load(tmp_path / "q").state_dict()["lobcq.codebooks"], codebooks)
    message = lobcq.refused("quantize", llama, "-o", tmp_path / "q2", "--codebooks", file, code=2)
    assert "has no set '8'" in message


def test_fitted_codebooks_suit_the_weights_better(lobcq: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    """On a tiny model, codebooks fitted to its own weights must not lose to universal ones by more than a trifle."""
    file = tmp_path / "codebooks.json"
    lobcq("calibrate", llama, "-o", file, "--text", text_file)
    arguments = ("quantize", llama, "-o")
    fitted = lobcq.json(*arguments, tmp_path / "fitted", "--codebooks", file)
    universal = lobcq.json(*arguments, tmp_path / "universal")
    assert fitted["worst_layers"][0]["weight_sqnr_db"] > universal["worst_layers"][0]["weight_sqnr_db"] - 0.5


def test_what_is_refused(lobcq: Run, llama: Path, tmp_path: Path) -> None:
    assert "ends in .json" in lobcq.refused("calibrate", llama, "-o", tmp_path / "codebooks.txt", code=2)
    (tmp_path / "c.json").write_text("{}")
    assert "exists" in lobcq.refused("calibrate", llama, "-o", tmp_path / "c.json", code=4)
    assert "8x64" in lobcq.refused("calibrate", llama, "-o", tmp_path / "d.json", "--format", "8", code=2)
