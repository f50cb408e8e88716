from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.cli.conftest import Run


def test_a_report_of_a_folder(
    lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pages" / "report.html"
    found = lobcq.json("report", quantized_llama[0], "-o", file)
    page = file.read_text(encoding="utf-8")
    assert found == {"report": str(file), "bytes": len(page.encode())}
    assert f"<h1>{llama.name}</h1>" in page
    assert "model.layers.1.mlp.down_proj" in page
    assert "exists" in lobcq.refused("report", quantized_llama[0], "-o", file, code=4)
    assert f"Wrote {file}" in lobcq("report", quantized_llama[0], "-o", file, "--overwrite").stdout.replace("\n", "")


def test_with_what_eval_has_found(
    lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    scores, file = tmp_path / "scores.json", tmp_path / "report.html"
    found = lobcq.json("eval", quantized_llama[0], "--against", llama, "--max-tokens", 300, "-o", scores)
    lobcq("report", quantized_llama[0], "-o", file, "--scores", scores)
    (perplexity, other) = (one["perplexity"] for one in found["results"][0]["models"])
    page = file.read_text(encoding="utf-8")
    assert f'<td class="n">{perplexity:.4f}</td><td class="n">{other:.4f}</td>' in page
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    for name, reason in {"list": "holds a list", "broken": "is no JSON"}.items():
        refused = lobcq.refused(
            "report", quantized_llama[0], "-o", file, "--scores", tmp_path / f"{name}.json", "--overwrite", code=3
        )
        assert reason in refused


def test_what_has_no_report(
    lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    assert "is a float model" in lobcq.refused("report", llama, "-o", tmp_path / "r.html", code=3)
    assert "name a file" in lobcq.refused("report", quantized_llama[0], "-o", tmp_path, code=2)
