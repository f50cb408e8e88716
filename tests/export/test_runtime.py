"""OnnxCausalLM: an exported folder called as the model was."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.errors import CallError, ExportError
from lobcq_fx.export import OnnxCausalLM, export_onnx


@pytest.fixture(scope="module")
def q(exported_lm):
    return exported_lm("gpt-neox").q


@pytest.fixture(scope="module")
def folder(exported_lm):
    return exported_lm("gpt-neox").folder


@pytest.fixture(scope="module")
def model(folder):
    return OnnxCausalLM(folder, threads=1)


IDS = torch.tensor([[5, 17, 3, 60, 8]])


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_p": 0.9, "temperature": 1.5},
    ],
    ids=["greedy", "beams", "sampling"],
)
def test_generates_as_the_quantized_model(q, model, settings):
    settings = {**settings, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for one in (q, model):
        torch.manual_seed(0)
        found.append(one.generate(IDS, **settings))
    assert torch.equal(*found)


def test_padded_batches_generate_what_each_sequence_does(q, model):
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.cat([IDS, torch.tensor([[0, 0, 9, 4, 33]])])
    mask = (ids != 0).long()
    assert torch.equal(
        model.generate(ids, attention_mask=mask, **settings), q.generate(ids, attention_mask=mask, **settings)
    )


@torch.no_grad()
def test_loss_and_outputs(q, model):
    mine, reference = model(IDS, labels=IDS), q(IDS, labels=IDS)
    torch.testing.assert_close(mine.loss, reference.loss, rtol=1e-4, atol=0)
    assert type(mine) is type(reference)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    with pytest.raises(CallError, match="output_attentions"):
        model(IDS, output_attentions=True)


@torch.no_grad()
def test_calls_that_an_export_cannot_serve_say_why(q, model, exported_lm):
    mask = torch.ones(2, 7, dtype=torch.bool)  # the type that masks are often made in
    ids = torch.arange(10, dtype=torch.int32).view(2, 5)
    out = model(ids, attention_mask=mask[:, :5])
    torch.testing.assert_close(out.logits, q(ids, attention_mask=mask[:, :5]).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(CallError, match="2 tokens after a cache of 5 for a batch of 2"):
        model(ids[:, :2], attention_mask=mask, past_key_values=out.past_key_values)
    last = OnnxCausalLM(exported_lm("gpt-neox", last_logits_only=True).folder, threads=1)
    for call in ({"labels": IDS}, {"logits_to_keep": 3}, {"logits_to_keep": torch.tensor([1])}):
        with pytest.raises(CallError, match="export without last_logits_only"):
            last(IDS, **call)


def test_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(ExportError, match=r"holds no model\.onnx"):
        OnnxCausalLM(tmp_path)
    x = torch.randn(2, 72)
    export_onnx(lobcq_fx.quantize(nn.Sequential(nn.Linear(72, 72)).eval(), example_inputs=x), tmp_path / "mlp", x)
    with pytest.raises(ExportError, match="no causal language model"):
        OnnxCausalLM(tmp_path / "mlp")


@pytest.mark.parametrize(
    ("version", "words"),
    [("2", "version 2 .* has version 1: update lobcq_fx"), ("0", "export it again"), (None, "not written by lobcq_fx")],
)
def test_another_version_says_what_to_update(folder, tmp_path, version, words):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    proto = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    entry = next(entry for entry in proto.metadata_props if entry.key == "lobcq.op_version")
    if version is None:
        proto.metadata_props.remove(entry)
    else:
        entry.value = version
    onnx.save(proto, str(tmp_path / "model.onnx"))
    with pytest.raises(ExportError, match=words):
        OnnxCausalLM(tmp_path)


def test_what_onnxruntime_cannot_open_names_the_remedy(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"\x08")
    with pytest.raises(ExportError, match=r"cannot open .*Remedy: a newer onnxruntime"):
        OnnxCausalLM(tmp_path)
