from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.cli.conftest import Run


def test_a_whole_folder_has_its_digest(lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = quantized_llama
    digest = json.loads((folder / "lobcq.index.json").read_text())["blake3"]
    found = lobcq.json("verify", folder)
    assert (found["blake3"], found["problems"]) == (digest, [])
    assert digest in lobcq("verify", folder).stdout


def test_all_that_differs_is_named(lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "q"
    shutil.copytree(quantized_llama[0], folder)
    with (folder / "lobcq.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    (folder / "graph.json").write_text((folder / "graph.json").read_text().replace("aten.mul", "aten.add", 1))
    message = lobcq.refused("verify", folder, code=3)
    assert "graph.json is not what was saved" in message
    assert message.count("; saved was ") == 1
    assert "Remedy: get the folder again" in message
    result = lobcq("verify", folder, "--json", code=3)
    assert len(json.loads(result.stdout)["problems"]) == 2


def test_a_model_in_several_files(lobcq: Run, llama: Path, tmp_path: Path) -> None:
    lobcq("quantize", llama, "-o", tmp_path / "q", "--max-shard-size", "100KB")
    names = sorted(file.name for file in (tmp_path / "q").glob("lobcq-*"))
    assert len(names) > 1
    assert "is what was saved: 4 files" in lobcq("verify", tmp_path / "q").stdout
    (tmp_path / "q" / names[0]).unlink()
    assert f"{names[0]} is missing" in lobcq.refused("verify", tmp_path / "q", code=3)
    message = lobcq.refused("quantize", llama, "-o", tmp_path / "r", "--max-shard-size", "a lot", code=2)
    assert "max_shard_size='a lot' is no size" in message


def test_a_folder_without_digests_says_so(lobcq: Run, tmp_path: Path) -> None:
    assert "lobcq.index.json is missing" in lobcq.refused("verify", tmp_path, code=3)
