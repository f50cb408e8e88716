from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.cli.conftest import Run


def test_a_report_of_a_folder(lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "pages" / "report.html"
    found = lobcq.json("report", quantized_llama[0], "-o", file)
    page = file.read_text(encoding="utf-8")
    assert found == {"report": str(file), "bytes": len(page.encode())}
    assert "llama-4bit" in page
    assert "model.layers.1.mlp.down_proj" in page
    assert "exists" in lobcq.refused("report", quantized_llama[0], "-o", file, code=4)
    assert f"Wrote {file}" in lobcq("report", quantized_llama[0], "-o", file, "--overwrite").stdout.replace("\n", "")


def test_what_has_no_report(
    lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    assert "is a float model" in lobcq.refused("report", llama, "-o", tmp_path / "r.html", code=3)
    assert "name a file" in lobcq.refused("report", quantized_llama[0], "-o", tmp_path, code=2)
