"""export_onnx on whole models: what ONNX Runtime computes against eager torch, the files, and the refusals."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from torch import nn

import lobcq_fx
from lobcq_fx.errors import CheckpointError, ExportError
from lobcq_fx.export import export_onnx
from tests.families import VOCABULARY, causal_lm


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.side, self.down = nn.Linear(72, 172), nn.Linear(72, 172, bias=False), nn.Linear(172, 72)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.side(x)) * self.up(x)) + x


def run(folder, **inputs):
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {value.name: torch.from_numpy(array) for value, array in zip(session.get_outputs(), outputs, strict=True)}


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture
def mlp():
    return lobcq_fx.quantize(Mlp().eval(), example_inputs=torch.randn(2, 3, 72))


@pytest.mark.parametrize("shape", [(2, 3, 72), (1, 1, 72), (5, 9, 72)], ids=str)
def test_plain_module_of_any_batch_and_length(mlp, tmp_path, shape):
    summary = export_onnx(mlp, tmp_path / "out", torch.randn(2, 3, 72))
    assert summary.nodes["lobcq::Linear"] == 3
    assert summary.nodes["lobcq::QuantizeActivation"] == 2  # up and side share one
    x = torch.randn(shape)
    assert_close(run(tmp_path / "out", x=x)["output"], mlp(x))


def test_w4a16(tmp_path):
    config = lobcq_fx.LobcqConfig(mode="w4a16")
    q = lobcq_fx.quantize(Mlp().eval(), config=config, example_inputs=torch.randn(2, 3, 72))
    summary = export_onnx(q, tmp_path / "out", torch.randn(2, 3, 72))
    assert summary.nodes["lobcq::LinearFloatActivation"] == 3
    x = torch.randn(4, 2, 72)
    assert_close(run(tmp_path / "out", x=x)["output"], q(x))


def test_bert(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=72, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    q = lobcq_fx.quantize(transformers.BertModel(config).eval())
    export_onnx(q, tmp_path / "out")
    ids = torch.arange(21).view(3, 7) % VOCABULARY
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    outputs = run(tmp_path / "out", **inputs)
    assert_close(outputs["last_hidden_state"], q(**inputs).last_hidden_state)
    assert_close(outputs["pooler_output"], q(**inputs).pooler_output)


@pytest.mark.parametrize("target", ["custom", "matmulnbits"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bloom"])
def test_causal_lm_writes_the_same_tokens(family, target, tmp_path):
    mode = "w4a4" if target == "custom" else "w4a16"
    q = lobcq_fx.quantize(causal_lm(family), config=lobcq_fx.LobcqConfig(mode=mode))
    export_onnx(q, tmp_path / "out", target=target)
    session = ort.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = torch.tensor([[5, 17, 3, 60, 8]])
    expected = q.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert greedy(session, ids, 32) == expected[0].tolist()


def greedy(session, ids, steps):
    """A decoding loop as a deployment has it: the prompt, then one token at a time on the grown cache."""
    taken = {value.name: value for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    cache = {
        name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for name, value in taken.items()
        if name.startswith("past_key_values")
    }
    tokens, step = ids[0].tolist(), ids.numpy()
    for _ in range(steps):
        positions = np.arange(len(tokens) - step.shape[1], len(tokens))[None]
        inputs = {"input_ids": step, "attention_mask": np.ones((1, len(tokens)), np.int64), "position_ids": positions}
        inputs = {name: value for name, value in inputs.items() if name in taken}
        outputs = dict(zip(names, session.run(None, inputs | cache), strict=True))
        tokens.append(int(outputs["logits"][0, -1].argmax()))
        step = np.array([[tokens[-1]]])
        cache = {name.replace("present", "past_key_values"): outputs[name] for name in names if name != "logits"}
    return tokens


def test_causal_lm_logits_of_a_padded_batch(tmp_path):
    q = lobcq_fx.quantize(causal_lm("llama"))
    export_onnx(q, tmp_path / "out")
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    call = {
        "input_ids": torch.arange(12).view(2, 6),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    past = {
        f"past_key_values.{layer}.{kind}": torch.zeros(2, heads, 0, width)
        for layer, (heads, *widths) in enumerate(q.calling.cache_heads)
        for kind, width in zip(("key", "value"), widths, strict=True)
    }
    assert_close(run(tmp_path / "out", **call, **past)["logits"], q(**call).logits)


def test_size_on_disk(tmp_path):
    torch.manual_seed(0)
    q = lobcq_fx.quantize(
        nn.Sequential(nn.Linear(2048, 1024), nn.Linear(1024, 2048)).eval(), example_inputs=torch.randn(2, 2048)
    )
    q.save_pretrained(tmp_path / "packed")
    summary = export_onnx(q, tmp_path / "onnx", torch.randn(2, 2048))
    assert summary.size <= 1.02 * (tmp_path / "packed" / "model.safetensors").stat().st_size


def test_refusals_leave_nothing(mlp, tmp_path, monkeypatch):
    x = torch.randn(2, 3, 72)
    with pytest.raises(ExportError, match="example_inputs is missing"):
        export_onnx(mlp, tmp_path / "out")
    with pytest.raises(ExportError, match="target is 'x'"):
        export_onnx(mlp, tmp_path / "out", x, target="x")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        export_onnx(mlp, file, x)
    monkeypatch.setattr("lobcq_fx.export.folder.check_session", wrong)
    with pytest.raises(ExportError, match="differs"):
        export_onnx(mlp, tmp_path / "out", x)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def wrong(*_):
    raise ExportError("output y differs")


def test_missing_package_names_the_extra(mlp, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'pip install "lobcq-fx\[onnx\]"'):
        export_onnx(mlp, tmp_path / "out", torch.randn(2, 3, 72))
