from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import lobcq_fx
from lobcq_fx.config import DEFAULT_EXCLUDE
from lobcq_fx.errors import NotStreamedError
from lobcq_fx.storage.journal import Journal
from lobcq_fx.streaming import skeleton
from tests.cli.conftest import Run
from tests.cli.processes import fork


def test_the_summary_agrees_with_the_float_model(quantized_llama: tuple[Path, dict[str, Any]], llama: Path) -> None:
    folder, found = quantized_llama
    model = LlamaForCausalLM.from_pretrained(llama)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    packed = sum(layer.weight.numel() for name, layer in linear.items() if name != "lm_head")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert found["layers_quantized"] == len(linear) - 1 == 14
    assert found["parameter_coverage"] == pytest.approx(packed / parameters)
    assert found["mac_coverage"] == pytest.approx(packed / sum(layer.weight.numel() for layer in linear.values()))
    assert found["float_bytes"] == 4 * parameters
    assert found["bytes_on_disk"] == sum(file.stat().st_size for file in folder.iterdir())
    # K = 172 is padded to 192; every tensor has an fp32 scale.
    bits = sum(
        4.5 * w.weight.shape[0] * -(-w.weight.shape[1] // 64) * 64 + 32 for n, w in linear.items() if n != "lm_head"
    )
    assert found["bits_per_scalar"] == pytest.approx(bits / packed)
    assert found["packed_bytes"] == 4 * (parameters - packed) + bits / 8
    assert {reason["reason"] for reason in found["left_in_float"]} >= {"excluded by pattern '@head'"}
    assert found["mac_coverage"] + sum(row["mac_share"] for row in found["left_in_float"]) == pytest.approx(1)


def test_the_steps_take_the_time_that_all_takes(lobcq: Run, llama: Path, tmp_path: Path) -> None:
    found = lobcq.json("quantize", llama, "-o", tmp_path / "q")
    steps = found["seconds_by_step"]
    assert list(steps) == ["load", "trace", "encode", "save"]
    assert min(steps.values()) >= 0
    assert 0.5 * found["seconds"] < sum(steps.values()) <= found["seconds"] + 0.02  # importing comes before the first
    assert max(steps, key=steps.__getitem__) == "trace"
    lines = lobcq("quantize", llama, "-o", tmp_path / "other").stdout.splitlines()
    (start,) = [place for place, line in enumerate(lines) if re.search(r"Time .* s", line)]
    titles = ("Load model", "Trace the graph", "Encode weights", "Save and verify")
    assert all(
        re.search(rf"{title}\W+\d+\.\d s", line) for title, line in zip(titles, lines[start + 1 :], strict=False)
    )


def test_the_worst_layers_come_first_and_were_measured(quantized_llama: tuple[Path, dict[str, Any]]) -> None:
    worst = quantized_llama[1]["worst_layers"]
    least = [min(row["weight_sqnr_db"], row["activation_sqnr_db"]) for row in worst]
    assert len(worst) == 5
    assert least == sorted(least)
    assert all(15 < value < 30 for value in least)


def test_the_folder_loads_and_keeps_the_tokenizer(quantized_llama: tuple[Path, dict[str, Any]], llama: Path) -> None:
    folder, _ = quantized_llama
    text = "The cat sees a key."
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, AutoTokenizer.from_pretrained(llama)(text, return_tensors="pt")["input_ids"])
    expected = lobcq_fx.quantize(LlamaForCausalLM.from_pretrained(llama).eval())(input_ids=ids).logits
    torch.testing.assert_close(lobcq_fx.load(folder)(input_ids=ids).logits, expected)


def test_settings_reach_the_model(lobcq: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    found = lobcq.json(
        "quantize", llama, "-o", tmp_path / "q", "--format", "4x32", "--include", "*.mlp.*", "--exclude", "*down_proj",
        "--activation-scale", "static", "--calibrate", text_file, "--calibration-samples", 3,
        "--calibration-length", 16, "--dtype", "bfloat16", "--kv-cache", "16x32", "--attention", "w4a8",
    )  # fmt: skip
    config = found["config"]
    assert (config["format"], config["activation_scale"], config["include"]) == ("4x32", "static", ["*.mlp.*"])
    assert (config["kv_cache"], config["attention"]) == ("16x32", "w4a8")
    assert config["exclude"] == [*DEFAULT_EXCLUDE, "*down_proj"]
    assert found["layers_quantized"] == 4
    model = lobcq_fx.load(tmp_path / "q")
    assert model(input_ids=torch.tensor([[1, 5, 7]])).logits.dtype == torch.bfloat16
    assert model.lobcq_config.to_dict() == config
    reasons = {row["reason"]: len(row["layers"]) for row in found["left_in_float"]}
    assert reasons["excluded by pattern '*down_proj'"] == 2
    assert reasons["matched by no include pattern"] == 8


def test_a_bound_on_memory_changes_nothing_that_is_written(
    lobcq: Run, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeleton, "SMALL", 1024)
    settings = (
        "--calibrate", text_file, "--calibration-samples", 3, "--calibration-length", 16, "--rounding", "compensated",
        "--smoothing", "folded",
    )  # fmt: skip
    bounded = lobcq.json("quantize", llama, "-o", tmp_path / "a" / "q", *settings, "--max-memory", "20KB")
    whole = lobcq.json("quantize", llama, "-o", tmp_path / "b" / "q", *settings)
    for other in ("output", "seconds", "seconds_by_step"):
        bounded.pop(other), whole.pop(other)
    assert bounded == whole
    written = [{one.name: one.read_bytes() for one in (tmp_path / name / "q").iterdir()} for name in "ab"]
    assert written[0] == written[1]


def test_layers_get_settings_of_their_own(lobcq: Run, llama: Path, tmp_path: Path) -> None:
    lobcq(
        *("quantize", llama, "-o", tmp_path / "q", "--no-default-exclude", "--exclude", "*k_proj"),
        *("--override", "@head:mode=w4a16,format=16x64", "--override", "*.down_proj:mode=w4a8"),
    )
    found = {r.layer: (r.mode, str(r.format)) for r in lobcq_fx.load(tmp_path / "q").inventory.quantized}
    assert found["lm_head"] == ("w4a16", "16x64")
    assert found["model.layers.1.mlp.down_proj"] == ("w4a8", "8x64")
    assert found["model.layers.0.self_attn.q_proj"] == ("w4a4", "8x64")
    assert "model.layers.0.self_attn.k_proj" not in found


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lm_head", "write it as"),
        ("lm_head:mode", "write it as"),
        ("*up_proj:modes=w4a8", "did you mean 'mode'"),
        ("@head:mode=w4a8", "--no-default-exclude"),
    ],
)
def test_overrides_that_cannot_be(lobcq: Run, llama: Path, tmp_path: Path, override: str, says: str) -> None:
    assert says in lobcq.refused("quantize", llama, "-o", tmp_path / "q", "--override", override, code=2)


def test_the_tables_people_see(lobcq: Run, llama: Path, tmp_path: Path) -> None:
    result = lobcq("quantize", llama, "-o", tmp_path / "q", "--mode", "w4a16")
    tables = ("W4A16, format 8x64", "14 of", "Parameters covered", "Multiply-adds covered", "Bits per", "On disk")
    for words in (*tables, "Worst layers", "Left in float", f"lobcq eval {tmp_path / 'q'} --against {llama}\n"):
        assert words in result.stdout, words
    for step in ("Load model", "Trace the graph", "Encode weights", "14/14", "Save and verify"):
        assert step in result.stderr, step


def test_json_is_all_that_standard_output_holds(llama: Path, tmp_path: Path) -> None:
    result = fork("quantize", str(llama), "-o", str(tmp_path / "q"), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["layers_quantized"] == 14
    assert "Encode weights" in result.stderr


def test_a_model_that_is_read_whole_is_said_to_be(
    lobcq: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotStreamedError("some/folder has no [norm.weight]")

    monkeypatch.setattr(lobcq_fx, "quantize_folder", refuse)
    result = lobcq("quantize", llama, "-o", tmp_path / "q")
    assert "some/folder has no [norm.weight]: the whole model is loaded" in " ".join(result.stderr.split())
    assert (tmp_path / "q" / "lobcq.safetensors").is_file()


def test_the_same_command_goes_on_after_a_full_disk(
    lobcq: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, full = Journal.add, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def adding(self: Journal, name: str, entry: Mapping[str, Any]) -> None:
        if len(self.entries) >= 3:  # two workers may have come between
            raise full
        add(self, name, entry)

    monkeypatch.setattr(Journal, "add", adding)
    message = lobcq.refused("quantize", llama, "-o", tmp_path / "q", code=4)
    assert "the disk is full" in message
    assert re.search(r"What is done is in \S*/ ?\.q\.unfinished: the same command goes on with it", message)
    monkeypatch.setattr(Journal, "add", add)
    assert lobcq.json("quantize", llama, "-o", tmp_path / "q")["layers_quantized"] == 14
    assert [one.name for one in tmp_path.iterdir()] == ["q"]


def test_an_encoder_takes_what_its_tokenizer_returns(quantized_bert: Path) -> None:
    inputs = AutoTokenizer.from_pretrained(quantized_bert)(
        ["A dog", "The cat finds the key"], padding=True, return_tensors="pt"
    )
    assert lobcq_fx.load(quantized_bert)(**inputs).last_hidden_state.shape == (*inputs["input_ids"].shape, 64)


def test_an_encoder_calibrates_on_lines(lobcq: Run, bert: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ("--calibrate", text_file, "--calibration-samples", 4, "--activation-scale", "static")
    found = lobcq.json("quantize", bert, "-o", tmp_path / "q", *arguments)
    assert all(row["activation_sqnr_db"] is not None for row in found["worst_layers"])


def test_an_existing_folder_is_kept_unless_told_otherwise(lobcq: Run, llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "q"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    message = lobcq.refused("quantize", llama, "-o", output, code=4)
    assert "exists" in message
    assert "--overwrite" in message
    assert [file.name for file in output.iterdir()] == ["notes.txt"]
    # Even --overwrite replaces a quantized model only, never someone's folder.
    assert "holds files that are not a" in lobcq.refused("quantize", llama, "-o", output, "--overwrite", code=4)
    assert (output / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_a_quantized_model(
    lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "q"
    shutil.copytree(quantized_llama[0], output)
    lobcq("quantize", llama, "-o", output, "--overwrite", "--format", "16x32")
    assert lobcq_fx.load(output).lobcq_config.format.name == "16x32"


def test_places_that_cannot_be_written(
    lobcq: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written: Not a directory" in lobcq.refused(
        "quantize", llama, "-o", tmp_path / "file" / "q", code=4
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert re.search(
        r"1.0 kB free and at least \d+\.\d kB are needed: free some space",
        lobcq.refused("quantize", llama, "-o", tmp_path / "q", code=4),
    )
    assert "which is read from: choose a folder outside of it" in lobcq.refused(
        "quantize", llama, "-o", llama / "q", code=4
    )
    assert not (tmp_path / "q").exists()


def test_settings_that_cannot_be(lobcq: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "q")
    assert "pass --calibrate TEXT" in lobcq.refused("quantize", llama, *output, "--codebooks", "fitted", code=2)
    assert "8x64" in lobcq.refused("quantize", llama, *output, "--format", "8by64", code=2)
    assert "w4a16" in lobcq.refused("quantize", llama, *output, "--mode", "w4", code=2)
    assert "did you mean 'universal'" in lobcq.refused("quantize", llama, *output, "--codebooks", "univrsal", code=2)
    contradiction = ("--mode", "w4a16", "--activation-scale", "static")
    assert "contradicts" in lobcq.refused("quantize", llama, *output, *contradiction, code=2)
    assert "no/file.json" in lobcq.refused("quantize", llama, *output, "--codebooks", "no/file.json", code=2)
    bound = ("--max-memory", "8GB")
    assert "is for --calibrate TEXT" in lobcq.refused("quantize", llama, *output, *bound, code=2)
    fitted = ("--codebooks", "fitted", "--calibrate", text_file)
    assert "fitted codebooks need all layers" in lobcq.refused("quantize", llama, *output, *fitted, *bound, code=3)
    much = ("--calibrate", text_file, "--max-memory", "much")
    assert "max_memory='much': pass a number of bytes" in lobcq.refused("quantize", llama, *output, *much, code=2)
    assert not (tmp_path / "q").exists()


def test_folders_that_are_no_float_model(
    lobcq: Run, llama: Path, quantized_llama: tuple[Path, dict[str, Any]], edited: Callable[..., Path], tmp_path: Path
) -> None:
    def refused(folder: object, *more: object) -> str:
        return lobcq.refused("quantize", folder, "-o", tmp_path / "q", *more, code=3)

    assert "there is no folder 'meta-llama/Llama-2-7b'" in refused("meta-llama/Llama-2-7b")
    assert "no config.json" in refused(tmp_path)
    assert "already quantized by 'gptq'" in refused(edited(llama, quantization_config={"quant_method": "gptq"}))
    (tmp_path / "edited" / "config.json").write_text("{")
    assert "cannot read config.json" in refused(tmp_path / "edited")
    (tmp_path / "edited" / "config.json").write_text("[]")
    assert "no JSON object" in refused(tmp_path / "edited")
    loaded = lobcq("quantize", quantized_llama[0], "-o", tmp_path / "q", code=3)
    assert "quantized already" in loaded.stderr


def test_unsupported_architectures(lobcq: Run, llama: Path, edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(llama, architectures=["BrandNewForCausalLM"], model_type="brand_new")
    message = lobcq("quantize", folder, "-o", tmp_path / "q", code=3).stderr
    assert "unsupported architecture BrandNewForCausalLM" in message
    assert not (tmp_path / "q").exists()


def test_missing_weights(lobcq: Run, llama: Path, edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(llama, without=("*.safetensors",))
    assert "cannot load" in lobcq("quantize", folder, "-o", tmp_path / "q", code=3).stderr


@pytest.mark.parametrize("size", [5, 1000, -1])
def test_weights_and_tokenizers_that_are_not_whole(
    lobcq: Run, llama: Path, text_file: Path, edited: Callable[..., Path], tmp_path: Path, size: int
) -> None:
    """They are the user's files: named, and nothing to report."""
    folder = edited(llama)
    for name in ("model.safetensors", "tokenizer.json"):
        file = folder / name
        whole = file.read_bytes()
        file.write_bytes(whole[:size])
        message = lobcq.refused("quantize", folder, "-o", tmp_path / "q", "--calibrate", text_file, code=3)
        assert "report" not in message
        assert name in message or "cannot load the tokenizer" in message
        file.write_bytes(whole)
    assert not (tmp_path / "q").exists()


def test_a_tokenizer_is_needed_only_for_text(
    lobcq: Run, llama: Path, text_file: Path, edited: Callable[..., Path], tmp_path: Path
) -> None:
    folder = edited(llama, without=("tokenizer*", "special_tokens*"))
    message = lobcq("quantize", folder, "-o", tmp_path / "q", "--calibrate", text_file, code=3).stderr
    assert "has no tokenizer" in message
    lobcq("quantize", folder, "-o", tmp_path / "q")
    assert not list((tmp_path / "q").glob("tokenizer*"))


def test_calibration_texts_that_cannot_be_used(lobcq: Run, llama: Path, tmp_path: Path) -> None:
    def refused(file: Path) -> str:
        return str(lobcq("quantize", llama, "-o", tmp_path / "q", "--calibrate", file, code=3).stderr)

    file = tmp_path / "text.txt"
    assert "cannot read" in refused(file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(file)
    file.write_text(" \n")
    assert "is empty" in refused(file)
    file.write_text("a")
    assert "too short" in refused(file)
