"""llama.cpp's side of the generation benchmark: the file that it reads and, where `LOBCQ_LLAMA_CPP` names one, itself.

The variable names an interpreter that has what benchmarks/model/llama_cpp says.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.model.llama_cpp.client import LlamaCpp, LlamaCppModel, why_absent
from benchmarks.model.plain_generate import CALL, race_generate
from benchmarks.model.speed import Settings, decode_name, summary
from benchmarks.model.turns import decode_turn, prefill_turn
from benchmarks.pages import cpu_models

VARIABLE = "LOBCQ_LLAMA_CPP"
PYTHON = Path(os.environ.get(VARIABLE, ""))
needs_llama_cpp = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no interpreter")
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="not installed: gguf")

IDS = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """With fewer heads of keys than of queries, and in sizes that Q4_K takes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=64, tie_word_embeddings=False, rope_theta=5000.0, rms_norm_eps=1e-4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def process() -> Iterator[LlamaCpp]:
    with LlamaCpp(PYTHON) as found:
        yield found


@pytest.fixture(scope="module")
def files(process: LlamaCpp, folder: Path) -> dict[str, Path]:
    """By kind."""
    files = {kind: folder / f"{kind}.gguf" for kind in ("F32", "Q4_0", "Q4_K")}
    process.call("write", folder=str(folder), target=str(files["F32"]))
    for kind in ("Q4_0", "Q4_K"):
        process.call("quantize", source=str(files["F32"]), target=str(files[kind]), kind=kind)
    return files


@needs_gguf
def test_transformers_reads_the_file_as_the_same_model(model: LlamaForCausalLM, folder: Path) -> None:
    from benchmarks.model.llama_cpp.gguf_file import write_gguf

    write_gguf(folder, folder / "written.gguf")
    read = LlamaForCausalLM.from_pretrained(folder, gguf_file="written.gguf").eval()
    with torch.no_grad():
        assert torch.equal(read(IDS).logits, model(IDS).logits)
    assert read.config.rope_parameters["rope_theta"] == 5000
    assert read.config.rms_norm_eps == pytest.approx(1e-4)


def test_where_it_is_absent_the_reason_is_known(tmp_path: Path) -> None:
    assert "--llama-cpp PYTHON" in str(why_absent(None))
    assert str(tmp_path / "python") in str(why_absent(tmp_path / "python"))
    if find_spec("llama_cpp") is None:
        assert "ModuleNotFoundError: No module named 'llama_cpp'" in str(why_absent(Path(sys.executable)))


@needs_llama_cpp
@pytest.mark.parametrize(("kind", "error"), [("F32", 0.01), ("Q4_0", 0.3), ("Q4_K", 0.3)])
def test_logits(process: LlamaCpp, files: dict[str, Path], model: LlamaForCausalLM, kind: str, error: float) -> None:
    with torch.no_grad():
        exact = model(IDS).logits[:, -1]
    found = LlamaCppModel(process, files[kind], 1).logits(IDS)
    assert float((found - exact).norm() / exact.norm()) < error


@needs_llama_cpp
def test_it_chooses_what_the_model_does_and_takes_turns(
    process: LlamaCpp, files: dict[str, Path], model: LlamaForCausalLM
) -> None:
    rival = LlamaCppModel(process, files["F32"], 1)
    expected = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=6, do_sample=False)
    for _ in range(2):
        assert rival.generate(IDS[:1], 6).tokens.tolist() == expected[:, 20:].tolist()
        assert decode_turn(rival, IDS, 4)() > 0
        assert prefill_turn(rival, IDS[:1])() > 0
    found = process.call("decode", prompts=IDS.tolist(), steps=5)["tokens"]
    rows = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)[:, 20:]
    assert torch.tensor(found).t().tolist() == rows[:, 1:].tolist()
    times = race_generate({"torch": model, "llama.cpp": rival}, IDS[:1], steps=4, rounds=2)
    assert [list(times["llama.cpp"]), len(times["llama.cpp"][CALL])] == [[CALL], 2]


@needs_llama_cpp
def test_what_goes_wrong_there_is_said_here(process: LlamaCpp, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"open: RuntimeError: llama.cpp cannot load .*none.gguf"):
        LlamaCppModel(process, tmp_path / "none.gguf", 1)
    with pytest.raises(RuntimeError, match="there is no call 'close'"):
        process.call("close")


def test_rows_of_the_summary_and_of_the_page() -> None:
    settings = Settings(("torch fp32", "ORT int4"), "torch fp32", (8,), (8, 32), (1, 4), steps=4, rounds=8)
    assert settings.decodes == [(8, 1), (32, 1), (8, 4)]
    assert [settings.rounds_of(length) for length in (8, 16, 32, 64)] == [8, 8, 4, 2]
    assert [decode_name(*one, settings) for one in settings.decodes] == ["decode", "decode_32", "decode_batch_4"]
    spans = {"torch fp32": {CALL: [(1.0, 3.0)]}}
    speed = {
        "threads": 1,
        "steps": 4,
        "decode": {
            "torch fp32": {"decode": [0.5], "decode_32": [1.0], "decode_batch_4": [1.0]},
            "ORT int4": {"decode": [0.25], "decode_32": [0.25]},
        },
        "prefill": {"torch fp32": {"8": [2.0]}, "ORT int4": {"8": [1.0]}},
        "generate": {"8": spans, "32": spans},
    }
    first, other = summary(speed, settings)
    assert [first[f"{race}_tokens_per_second"] for race in ("decode", "decode_32", "decode_batch_4")] == [2, 1, 4]
    assert [first[f"{name}_decode_tokens_per_second"] for name in ("generate", "generate_32")] == [1, 1]
    assert {key: value for key, value in other.items() if key.endswith("ratio")} == {
        "decode_ratio": 2,
        "decode_32_ratio": 4,
        "prefill_8_ratio": 2,
    }
    columns = {"decode": "decode, tokens/s", "decode_32": "decode behind 32", "decode_batch_4": "decode, batch 4"}
    columns |= {
        "prefill_8": "prompt of 8",
        "generate_decode": "decode by `generate()`",
        "generate_32_decode": "behind 32",
    }
    report = {"prompts": [8], "decode_from": [8, 32], "batches": [1, 4], "speed": [first, other]}
    assert cpu_models.columns_of(report) == columns
    memory = [{"contender": name, "used_mib": 512} for name in settings.names]
    absent = {"llama.cpp Q4_0": "no interpreter"}
    page = cpu_models.model_section(report | {"memory": memory, "not_run": absent})
    assert "| ORT int4 | 1 | 4.0 (2.00x) | 4.0 (4.00x) | - | 8.0 (2.00x) | - | - | 0.50 |" in page
    assert page.endswith("Not run: llama.cpp Q4_0 (no interpreter).")
