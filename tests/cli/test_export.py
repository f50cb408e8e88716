from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.conftest import Run


def test_summary(exported_llama: tuple[Path, dict[str, Any]]) -> None:
    out, found = exported_llama
    assert found["bytes"] == sum((out / name).stat().st_size for name in ("model.onnx",))
    assert found["library_nodes"] == found["nodes"]["lobcq::Linear"] + found["nodes"]["lobcq::QuantizeActivation"]
    assert found["difference_with_function_bodies"] < 1e-3
    assert {"layer": "lm_head", "reason": "excluded by pattern '@head'"} in found["left_in_float"]
    assert found["genai"] is None
    assert (out / "genai_config.json").is_file()


def test_the_exported_model_writes_the_same_text(
    lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], exported_llama: tuple[Path, dict[str, Any]]
) -> None:
    arguments = ("-p", "The cat sees", "--max-new-tokens", 12)
    expected = lobcq.json("generate", quantized_llama[0], *arguments)
    found = lobcq.json("generate", "--onnx", exported_llama[0], *arguments)
    assert (found["tokens"], found["text"]) == (expected["tokens"], expected["text"])


def test_people_see_a_table(lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shown = lobcq("export", "onnx", quantized_llama[0], "-o", tmp_path / "onnx").stdout
    for words in ("Largest difference to torch", "lobcq::Linear", "lm_head", "lobcq generate --onnx"):
        assert words in shown


def test_refusals(
    lobcq: Run,
    llama: Path,
    quantized_llama: tuple[Path, dict[str, Any]],
    exported_llama: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    edited: Callable[..., Path],
) -> None:
    quantized = quantized_llama[0]
    assert "is a float model: quantize it first" in lobcq.refused("export", "onnx", llama, "-o", tmp_path / "a", code=3)
    assert "pass --overwrite" in lobcq.refused("export", "onnx", quantized, "-o", exported_llama[0], code=4)
    refused = lobcq.refused("export", "onnx", quantized, "-o", llama, "--overwrite", code=4)
    assert "holds files that are not a" in refused
    assert "holds no model.onnx" in lobcq.refused("generate", "--onnx", quantized, "-p", "a", code=3)
    assert not (tmp_path / "a").exists()
