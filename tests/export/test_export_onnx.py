"""export_onnx on whole models: what ONNX Runtime computes against eager torch, the files, and the refusals."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import nn

import lobcq_fx
from lobcq_fx.errors import CheckpointError, ExportError
from lobcq_fx.export import OnnxCausalLM, export_onnx, folder, self_check
from lobcq_fx.format import decode
from lobcq_fx.frontends.output_types import CACHE_NAME
from lobcq_fx.modules.packed_weight import PackedWeight
from tests.export.checked import export_checked
from tests.export.sessions import Session
from tests.families import VOCABULARY
from tests.sweeps import sweep


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.side, self.down = nn.Linear(72, 172), nn.Linear(72, 172, bias=False), nn.Linear(172, 72)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.side(x)) * self.up(x)) + x


def quantized(model: nn.Module, *example: int, **settings: str) -> lobcq_fx.QuantizedModel:
    config = lobcq_fx.LobcqConfig(**settings)
    return lobcq_fx.quantize(model.eval(), config=config, example_inputs=torch.randn(example))


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture(scope="module")
def mlp():
    return quantized(Mlp(), 2, 3, 72)


@pytest.fixture(scope="module")
def exported_mlp(mlp, tmp_path_factory):
    return export_checked(mlp, tmp_path_factory.mktemp("mlp") / "out", torch.randn(2, 3, 72))


@pytest.mark.parametrize("shape", [(2, 3, 72), (1, 1, 72), (5, 9, 72)], ids=str)
def test_plain_module_of_any_batch_and_length(mlp, exported_mlp, shape):
    out, summary = exported_mlp.folder, exported_mlp.summary
    assert summary.nodes["lobcq::Linear"] == 3
    assert summary.nodes["lobcq::QuantizeActivation"] == 2  # up and side share one
    assert summary.library_nodes == 5
    assert summary.genai == "it is no causal language model"
    x = torch.randn(shape)
    for use_library in (False, True):
        assert_close(Session(out, use_library=use_library)(x=x)["output"], mlp(x))


def test_shapes_are_inferred(exported_mlp):
    """From the inputs through our operators to the outputs."""
    proto = onnx.load(str(exported_mlp.folder / "model.onnx"))
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    known = {value.name for value in inferred.graph.value_info if value.type.tensor_type.elem_type}
    ours = [name for node in proto.graph.node if node.domain == "lobcq" for name in node.output]
    assert len(ours) == 11
    assert set(ours) - {value.name for value in proto.graph.output} <= known


@pytest.mark.parametrize(("mode", "nodes"), [
    ("w4a8", {"lobcq::QuantizeActivationInt8": 2, "lobcq::LinearInt8Activation": 3}),
    ("w4a16", {"lobcq::LinearFloatActivation": 3}),
])  # fmt: skip
def test_other_modes(tmp_path, mode, nodes):
    q = quantized(Mlp(), 2, 3, 72, mode=mode)
    summary = export_onnx(q, tmp_path / "out", torch.randn(2, 3, 72))
    assert {name: count for name, count in summary.nodes.items() if name.startswith("lobcq")} == nodes
    x = torch.randn(4, 2, 72)
    assert_close(Session(tmp_path / "out", use_library=True)(x=x)["output"], q(x))


@pytest.mark.parametrize("dtype", sweep([torch.bfloat16, torch.float16], [torch.bfloat16]), ids=str)
def test_narrow_floats_become_fp32(dtype, tmp_path):
    model = Mlp().to(dtype).eval()
    x = torch.randn(2, 3, 72).to(dtype)
    q = lobcq_fx.quantize(model, example_inputs=x)
    export_onnx(q, tmp_path / "out", x)
    actual = Session(tmp_path / "out")(x=x.float())["output"]
    assert actual.dtype == torch.float32
    difference = (actual - q(x).float()).norm() / actual.norm()
    assert difference < (0.05 if dtype is torch.bfloat16 else 0.01)


def test_bert(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=72, intermediate_size=172, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCABULARY
    )
    q = lobcq_fx.quantize(transformers.BertModel(config).eval())
    export_onnx(q, tmp_path / "out")
    ids = torch.arange(21).view(3, 7) % VOCABULARY
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    outputs = Session(tmp_path / "out")(**inputs)
    assert_close(outputs["last_hidden_state"], q(**inputs).last_hidden_state)
    assert_close(outputs["pooler_output"], q(**inputs).pooler_output)


# Windows, soft caps and head norms; positions that start elsewhere; ALiBi. Others: test_parity.py, and `make families`.
@pytest.mark.parametrize("family", sweep(["gemma3", "opt", "bloom", "gpt-neox"], ["gemma3", "bloom"]))
def test_other_families_export(family, exported_lm):
    """The self-check compares a prompt, a token after it, and several tokens after a cache."""
    exported = exported_lm(family)
    q, out = exported.q, exported.folder
    assert exported.summary.differences.functions < 1e-3
    names = [value.name for value in Session(out).inner.get_outputs()]
    assert names[:3] == ["logits", "present.0.key", "present.0.value"]
    assert (out / "genai_config.json").is_file()
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = OnnxCausalLM(out, threads=1).generate(ids, return_dict_in_generate=True, **settings)
    assert torch.equal(found.sequences, q.generate(ids, **settings))
    assert {layer.keys.shape[2] for layer in found[CACHE_NAME].layers} == {12}  # windows are kept whole


def test_matmulnbits(exported_lm):
    """Greedy tokens are W4A16's, in stock operators alone."""
    exported = exported_lm("gpt2", mode="w4a16", target="matmulnbits")
    assert exported.summary.library_nodes == 0
    assert exported.summary.nodes["com.microsoft::MatMulNBits"] == 4
    ids = torch.tensor([[5, 17, 3, 60, 8]])
    settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = exported.q.generate(ids, **settings)
    assert torch.equal(OnnxCausalLM(exported.folder, use_library=False).generate(ids, **settings), expected)


def test_matmulnbits_leaves_activations_in_float(mlp, tmp_path):
    """Of a graph in W4A4 as well."""
    summary = export_onnx(mlp, tmp_path / "out", torch.randn(2, 3, 72), target="matmulnbits")
    assert summary.library_nodes == 0
    assert summary.nodes["com.microsoft::MatMulNBits"] == 3
    x = torch.randn(4, 2, 72)
    expected = quantized(Mlp(), 2, 3, 72, mode="w4a16")(x)
    assert_close(Session(tmp_path / "out")(x=x)["output"], expected)


def test_matmulnbits_holds_the_decoded_weight_exactly(tmp_path):
    q = quantized(nn.Sequential(nn.Linear(200, 40)), 2, 200, mode="w4a16")
    export_onnx(q, tmp_path / "out", torch.randn(2, 200), target="matmulnbits")
    tensors = {
        name: value.const_value.numpy().copy()
        for name, value in ir.load(tmp_path / "out" / "model.onnx").graph.initializers.items()
    }
    q._restore()
    packed = next(module for module in q.modules() if isinstance(module, PackedWeight))
    entries = torch.from_numpy(tensors["0.weight.blocks"]).to(torch.int16) - 128
    scaled = entries * torch.from_numpy(tensors["0.weight.block_scales"])[..., None]
    weight = (scaled * packed.tensor_scale).view(40, -1)[:, :200]
    encoded = lobcq_fx.format.Encoded(
        packed.codes, packed.selectors, packed.scales, packed.tensor_scale, q.graph_module.lobcq.codebooks,
        packed.spec, 200,
    )  # fmt: skip
    assert torch.equal(weight, decode(encoded))


def test_last_logits_only(mlp, exported_lm, tmp_path):
    exported = exported_lm("gpt-neox", last_logits_only=True)
    q, out = exported.q, exported.folder
    ids = torch.arange(12).view(2, 6)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(6).expand(2, 6)}
    logits = Session(out)(**{name: tensor.contiguous() for name, tensor in call.items()})["logits"]
    assert_close(logits, q(**call).logits[:, -1:])
    expected = q.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    found = OnnxCausalLM(out).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    with pytest.raises(ExportError, match="last_logits_only asks for a language model"):
        export_onnx(mlp, tmp_path / "other", torch.randn(2, 3, 72), last_logits_only=True)


def test_size_on_disk(tmp_path):
    torch.manual_seed(0)
    q = quantized(nn.Sequential(nn.Linear(2048, 1024), nn.Linear(1024, 2048)), 2, 2048)
    q.save_pretrained(tmp_path / "packed")
    summary = export_onnx(q, tmp_path / "onnx", torch.randn(2, 2048))
    assert summary.size <= 1.02 * (tmp_path / "packed" / "lobcq.safetensors").stat().st_size
    assert summary.size == sum(file.stat().st_size for file in (tmp_path / "onnx").iterdir())


def test_an_export_is_replaced_as_a_whole(mlp, tmp_path):
    """Nothing of a larger one stays, but notes of its owner do."""
    large = quantized(nn.Sequential(nn.Linear(2048, 1024)), 2, 2048)
    export_onnx(large, tmp_path / "out", torch.randn(2, 2048))
    assert (tmp_path / "out" / "model.onnx.data").is_file()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    export_onnx(mlp, tmp_path / "out", torch.randn(2, 3, 72))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "notes.txt"]


def test_refusals_leave_nothing(mlp, tmp_path, monkeypatch):
    x = torch.randn(2, 3, 72)
    with pytest.raises(ExportError, match="example_inputs is missing"):
        export_onnx(mlp, tmp_path / "out")
    with pytest.raises(ExportError, match="target is 'x'"):
        export_onnx(mlp, tmp_path / "out", x, target="x")
    with pytest.raises(ExportError, match="needs no op library"):
        export_onnx(mlp, tmp_path / "out", x, target="matmulnbits", include_library=True)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        export_onnx(mlp, file, x)
    save = folder._save

    def save_wrong(model: ir.Model, path):
        """A scale of one weight, doubled."""
        value = model.graph.initializers["up.weight.tensor_scale"]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(2), name=value.name)
        return save(model, path)

    monkeypatch.setattr(folder, "_save", save_wrong)
    with pytest.raises(ExportError, match="with function bodies encodes no activation alike"):
        export_onnx(mlp, tmp_path / "out", x)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_self_check_finds_a_scale_that_is_a_percent_off(exported_mlp, tmp_path):
    """Though only rounding differs in the export itself, and then a code here and there."""
    assert exported_mlp.summary.differences.functions < 1e-5
    assert exported_mlp.summary.differences.moved_codes < 0.02
    with pytest.raises(ExportError, match="output output differs by"):
        exported_mlp.check_with_a_scale_off("down.weight.tensor_scale", tmp_path / "wrong.onnx")


class Outputs(nn.Module):
    def __init__(self, results) -> None:
        super().__init__()
        self.linear, self.results = nn.Linear(64, 64), results

    def forward(self, hidden_states: torch.Tensor):
        return self.results(hidden_states, self.linear(hidden_states))


def test_outputs_may_have_the_names_of_anything(tmp_path):
    q = quantized(Outputs(lambda x, y: {"hidden_states": y.relu(), "linear": y, "relu": y + 1, "same": x}), 2, 64)
    export_onnx(q, tmp_path / "out", torch.randn(2, 64))
    x = torch.randn(3, 64)
    found, expected = Session(tmp_path / "out")(hidden_states=x), q(x)
    assert set(found) == {"hidden_states_out", "linear", "relu", "same"}
    for name, value in expected.items():
        assert_close(found[f"{name}_out" if name == "hidden_states" else name], value)


def test_outputs_that_are_not_finite_are_compared_elsewhere(tmp_path):
    q = quantized(Outputs(lambda x, y: y.masked_fill(x > 0, -torch.inf)), 2, 64)
    export_onnx(q, tmp_path / "out", torch.randn(2, 64))


def test_a_zero_in_the_place_of_nan_is_a_difference():
    with pytest.raises(ExportError, match="NaN or infinity"):
        self_check._difference("y", torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 0.0]), "ONNX Runtime")


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(ExportError, match="output output_1 is None, which no ONNX graph returns"):
        export_onnx(quantized(Outputs(lambda x, y: (y, None)), 2, 64), tmp_path / "out", torch.randn(2, 64))
    with pytest.raises(ExportError, match="hold an empty tensor"):
        export_onnx(quantized(Outputs(lambda x, y: y), 2, 64), tmp_path / "out", torch.randn(0, 64))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_else_stays(mlp, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"someone else's")
    with pytest.raises(CheckpointError, match="choose a new or empty folder"):
        export_onnx(mlp, tmp_path, torch.randn(2, 3, 72))
    assert (tmp_path / "model.onnx").read_bytes() == b"someone else's"


def test_a_shared_layer_and_static_scales(tmp_path):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.linear(x).tanh())

    x = torch.randn(4, 64)
    q = lobcq_fx.quantize(Shared().eval(), [x], lobcq_fx.LobcqConfig(activation_scale="static"))
    export_onnx(q, tmp_path / "out", x)
    for use_library in (False, True):
        assert_close(Session(tmp_path / "out", use_library=use_library)(x=x)["output"], q(x))
    export_onnx(q, tmp_path / "bits", x, target="matmulnbits")


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(self.linear(x))

    q = quantized(Odd(), 2, 64)
    with pytest.raises(ExportError, match=r"no operator for prims\.bessel_j0\.default, which follows linear,"):
        export_onnx(q, tmp_path / "out", torch.randn(2, 64))
    assert not list(tmp_path.iterdir())


def test_missing_and_old_packages_are_named(mlp, tmp_path, monkeypatch):
    x = torch.randn(2, 3, 72)
    monkeypatch.setattr("onnxruntime.__version__", "1.19.2rc1")
    with pytest.raises(ExportError, match=r"needs onnxruntime 1\.20, this is 1\.19\.2rc1: pip install"):
        export_onnx(mlp, tmp_path / "out", x)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'needs onnx: pip install "lobcq-fx\[onnx\]"'):
        export_onnx(mlp, tmp_path / "out", x)


def test_genai_config_points_into_the_folder(exported_lm):
    exported = exported_lm("gpt-neox")
    config = json.loads((exported.folder / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert (exported.folder / decoder["session_options"]["custom_ops_library"]).is_file()
    assert decoder["filename"] == "model.onnx"
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == exported.q.calling.cache_heads[0][:2]
