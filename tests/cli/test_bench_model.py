"""`lobcq bench --model`: what is measured, checked and refused, on models too small to say anything about speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lobcq_fx.benchmarking.generating import OtherTokensError, check_tokens, generate, timed_generate
from lobcq_fx.benchmarking.model_speed import Load, Runner, measure_models
from lobcq_fx.benchmarking.step_reads import bytes_of_a_step, bytes_of_states
from tests.cli.conftest import Run
from tests.families import quantized_causal_lm

QUICK = ("--rounds", 2, "--threads", 1, "--prompt-tokens", 12, "--new-tokens", 4)
IDS = torch.tensor([[7, 3, 11, 3, 11, 40]])


def test_json(lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], llama: Path) -> None:
    found = lobcq.json("bench", "--model", quantized_llama[0], "--against", llama, *QUICK)
    assert [found[key] for key in ("threads", "rounds", "prompt_tokens", "new_tokens")] == [1, 2, 12, 4]
    assert found["read_gb_per_second"] > 0
    assert found["not_run"] == []
    ours, other = found["results"]
    assert [ours["model"], other["model"]] == ["llama-4bit (quantized)", "llama (float)"]
    for row in (ours, other):
        assert row["roofline_tokens_per_second"] == pytest.approx(found["read_gb_per_second"] * 1e9 / row["step_bytes"])
        share = row["decode_tokens_per_second"] / row["roofline_tokens_per_second"]
        assert row["roofline_share"] == pytest.approx(share)
    assert ours["speedups"] == {"prefill": 1, "decode": 1, "generate": 1}
    assert ours["step_bytes"] < other["step_bytes"]


def test_people_see_a_table_and_a_plot(
    lobcq: Run,
    quantized_llama: tuple[Path, dict[str, Any]],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plot, arguments = tmp_path / "plot.svg", ("--model", quantized_llama[0], "--against", llama, *QUICK)
    shown = lobcq("bench", *arguments, "--plot", plot).stdout
    for words in (
        "4 tokens behind 12 on ",
        "1 thread;",
        "llama-4bit",
        "Memory allows",
        " %)",
        "x)",
        "found in a cache",
    ):
        assert words in shown, words
    assert max(len(line) for line in shown.splitlines() if line.startswith(("│", "┃"))) <= 80
    drawn = plot.read_text()
    for words in ("llama-4bit (quantized)", "llama (float)", "new tokens a second", "the speed of memory"):
        assert words in drawn, words
    assert "exists: pass --overwrite" in lobcq.refused("bench", *arguments, "--plot", plot, code=4)


def test_models_of_one_name_are_told_apart(lobcq: Run, llama: Path) -> None:
    twice = ("--model", llama, "--against", llama, "--rounds", 1, "--threads", 1, "--new-tokens", 2)
    names = [row["model"] for row in lobcq.json("bench", *twice)["results"]]
    assert names == [f"{llama}, 1.", f"{llama}, 2."]


def test_defaults_fit_into_the_model(lobcq: Run, llama: Path) -> None:
    found = lobcq.json("bench", "--model", llama, "--rounds", 1, "--threads", 1)
    assert found["prompt_tokens"] + found["new_tokens"] == 64


def test_an_exported_model_has_turns_too(
    lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], exported_llama: tuple[Path, dict[str, Any]]
) -> None:
    out = exported_llama[0]
    found = lobcq.json("bench", "--model", quantized_llama[0], "--onnx", out, *QUICK)
    assert [row["model"] for row in found["results"]] == ["llama-4bit (quantized)", "llama-onnx (ONNX Runtime)"]
    assert "step_bytes" not in found["results"][1]
    assert "pass it as --onnx" in lobcq.refused("bench", "--model", out, code=3)


def test_what_cannot_be_measured(lobcq: Run, llama: Path, bert: Path, tmp_path: Path) -> None:
    assert "cannot generate text: pass a causal language model" in lobcq.refused("bench", "--model", bert, code=3)
    assert "there is no folder" in lobcq.refused("bench", "--model", tmp_path / "none", code=3)
    assert "lower one" in lobcq.refused("bench", "--model", llama, "--prompt-tokens", 62, "--new-tokens", 3, code=2)
    assert "leave it out, or --model" in lobcq.refused("bench", "--model", llama, "--rows", 1, code=2)
    assert "`lobcq export onnx` wrote" in lobcq.refused("bench", "--model", llama, "--onnx", tmp_path, code=3)
    assert "pass --model DIR too" in lobcq.refused("bench", "--against", llama, code=2)
    assert ".png, .svg, .pdf" in lobcq.refused("bench", "--model", llama, "--plot", tmp_path / "plot.txt", code=2)


def test_another_choice_is_no_speed(llama: Path) -> None:
    """A model that draws, whatever it is told."""
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    expected = generate(model, IDS, 4)
    check_tokens("same", timed_generate(model, IDS, 4).tokens, expected)
    call = model.forward

    def noisy(*args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        out.logits += 100 * torch.randn_like(out.logits)
        return out

    model.forward = noisy
    with pytest.raises(OtherTokensError, match=r"noisy: from new token \d on .*Remedy"):
        measure_models([Runner("noisy", model)], Load(6, 8, 1, 1), lambda *_: None)


def test_times_of_the_first_and_of_the_rest(llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    found = timed_generate(model, IDS, 5)
    assert found.tokens.shape == (1, 5)
    assert found.first_seconds > 0
    assert found.seconds == found.first_seconds + found.rest_seconds > found.first_seconds


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_weights_and_no_table(llama: Path, tied: bool) -> None:
    """Where the head is the table itself, it is read, once."""
    config = LlamaForCausalLM.from_pretrained(llama).config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    tensors = {one.data_ptr(): one.nbytes for one in model.parameters()}
    if not tied:
        del tensors[model.model.embed_tokens.weight.data_ptr()]
    rotary = model.model.rotary_emb.inv_freq.nbytes
    assert bytes_of_a_step(model, IDS) - sum(tensors.values()) in (0, rotary)
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert bytes_of_states(model, IDS) == config.num_hidden_layers * 2 * IDS.shape[1] * heads * size * 4


def test_a_quantized_step_reads_what_is_packed() -> None:
    _, q = quantized_causal_lm("llama")
    packed = sum(
        one.nbytes for name, one in q.named_buffers() if name.endswith(("prepacked", "codes", "selectors", "scales"))
    )
    head = q.graph_module.get_parameter("lm_head.weight").nbytes
    assert packed + head < bytes_of_a_step(q, IDS) < 1.5 * (packed + head)
