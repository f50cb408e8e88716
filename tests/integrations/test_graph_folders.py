"""`from_pretrained` of folders that `QuantizedModel.save_pretrained` wrote: the original class, the graph's numbers."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.errors import CheckpointError, ConfigError
from lobcq_fx.modules.lobcq_linear import LobcqLinear
from tests.families import CAUSAL_LMS
from tests.integrations.models import GREEDY, IDS, batches, bert, causal_lm, opened, results, saved, uneven
from tests.storage.reindex import reindex
from tests.sweeps import crossed, sweep

MODES = ("w4a4", "w4a8", "w4a16")
RELEASE_0_1 = Path(__file__).parent.parent / "storage" / "release_0_1.tar.gz"

STATIC = LobcqConfig(activation_scale="static")
SETTINGS = {
    "static scales": (STATIC, True),
    "static scales in int8": (LobcqConfig(activation_scale="static", mode="w4a8"), True),
    "smoothing folded": (LobcqConfig(smoothing="folded"), True),
    "smoothing everywhere": (LobcqConfig(smoothing="everywhere"), True),
    "compensated rounding": (LobcqConfig(rounding="compensated"), True),
    "rotated": (LobcqConfig(rotation="hadamard"), True),
    "rotated in int8": (LobcqConfig(rotation="hadamard", mode="w4a8"), True),
    "rotated in float": (LobcqConfig(rotation="hadamard", mode="w4a16"), True),
    "recipe best": (LobcqConfig.of_recipe("best"), True),
    "fitted codebooks": (LobcqConfig(codebooks="fitted"), True),
    "layers of their own": (
        LobcqConfig(
            exclude=("@head", "*.k_proj"),
            overrides={"*mlp*": {"mode": "w4a16", "format": "2x128"}, "*.q_proj": {"activation_format": "16x16"}},
        ),
        False,
    ),
}


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LobcqLinear)}


@pytest.mark.parametrize("mode", MODES)
def test_a_language_model_gives_the_graphs_logits_and_tokens(tmp_path, mode):
    folder = saved(causal_lm(), tmp_path / "q", LobcqConfig(mode=mode))
    model, q = opened(folder), lobcq_fx.load(folder)
    assert type(model) is transformers.LlamaForCausalLM
    assert len(linears(model)) == len(q.inventory.quantized) == 14
    assert torch.equal(results(model), results(q))
    assert torch.equal(model.generate(IDS, **GREEDY), q.generate(IDS, **GREEDY))


@pytest.mark.parametrize("mode", MODES)
def test_an_encoder_gives_the_graphs_states(tmp_path, mode):
    folder = saved(bert(), tmp_path / "q", LobcqConfig(mode=mode))
    model = opened(folder, transformers.AutoModel)
    assert type(model) is transformers.BertModel
    assert torch.equal(results(model), results(lobcq_fx.load(folder)))


@pytest.mark.parametrize("make", [causal_lm, bert])
def test_the_folder_names_the_class_and_no_other_quantization(tmp_path, make):
    """Models that were made from a configuration, or read from GGUF, do not know the first and keep the second."""
    model = make()
    model.config.architectures = None
    model.config.quantization_config = transformers.GPTQConfig(bits=4)
    folder = saved(model, tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert config["quantization_config"]["quant_method"] == "lobcq"
    assert not hasattr(lobcq_fx.load(folder).config, "quantization_config")
    assert model.config.architectures is None


def test_the_weights_are_the_bytes_of_the_folder(tmp_path):
    folder = saved(causal_lm(), tmp_path / "q")
    stored, state = load_file(folder / "lobcq.safetensors"), opened(folder).state_dict()
    packed = [name for name in stored if ".weight." in name]
    assert len(packed) == 4 * 14
    for name in packed:
        assert torch.equal(state[name].flatten().view(torch.uint8), stored[name].flatten().view(torch.uint8)), name


def test_several_files_are_the_same_model_and_none_outside_is_read(tmp_path):
    q = lobcq_fx.load(saved(causal_lm(), tmp_path / "whole"))
    folder = tmp_path / "q"
    q.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("lobcq-*.safetensors"))) > 5
    model = opened(folder)
    assert torch.equal(results(model), results(q))
    model.save_pretrained(tmp_path / "modules")
    assert torch.equal(results(opened(tmp_path / "modules")), results(q))
    index = json.loads((folder / "lobcq.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"].values()))
    shutil.copytree(folder, tmp_path / "other")
    for place, message in {"..": "has no graph.json", "../other": "its index of shards names other files"}.items():
        named = {tensor: f"{place}/{file}" if file == first else file for tensor, file in index["weight_map"].items()}
        (folder / "lobcq.safetensors.index.json").write_text(json.dumps({**index, "weight_map": named}))
        with pytest.raises(CheckpointError, match=message):
            opened(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_module_can_do_it_does_as_the_graph(tmp_path, name):
    config, calibrated = SETTINGS[name]
    folder = saved(uneven(), tmp_path / "q", config, batches() if calibrated else None)
    assert torch.equal(results(opened(folder)), results(lobcq_fx.load(folder)))


def test_each_layer_has_its_own_settings(tmp_path):
    model = opened(saved(uneven(), tmp_path / "q", SETTINGS["layers of their own"][0]))
    found = {name.rpartition(".")[2]: one.settings for name, one in linears(model).items()}
    assert "k_proj" not in found
    assert (found["up_proj"].mode, found["up_proj"].spec.name) == ("w4a16", "2x128")
    assert (found["q_proj"].mode, found["q_proj"].activations.name) == ("w4a4", "16x16")
    assert (found["v_proj"].mode, found["v_proj"].activations.name) == ("w4a4", "8x64")


def test_smoothing_everywhere_and_static_scales_are_in_the_modules(tmp_path):
    scaled = linears(opened(saved(uneven(), tmp_path / "scaled", SETTINGS["smoothing everywhere"][0], batches())))
    assert any(one.input_scale is not None and one.input_scale.unique().numel() > 1 for one in scaled.values())
    static = linears(opened(saved(uneven(), tmp_path / "static", STATIC, batches())))
    assert len({float(one.activation_scale) for one in static.values()}) > 2


@pytest.mark.parametrize(
    "family", sweep(["llama-tied", "gpt2", "qwen2", "gemma3", "phi3", "opt"], ["llama-tied", "gpt2", "gemma3"])
)
def test_families(tmp_path, family):
    folder = saved(causal_lm(family), tmp_path / "q")
    model, q = opened(folder), lobcq_fx.load(folder)
    assert model.config.model_type == CAUSAL_LMS[family]().model_type
    torch.testing.assert_close(results(model), results(q), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.generate(IDS, **GREEDY), q.generate(IDS, **GREEDY))


def test_the_dtype_is_that_of_the_quantized_model_whatever_its_configuration_says(tmp_path):
    float_model = causal_lm()
    float_model.config.dtype = torch.float32
    folder = saved(float_model.to(torch.bfloat16), tmp_path / "q")
    model, q = opened(folder), lobcq_fx.load(folder)
    assert model.dtype == results(model).dtype == torch.bfloat16
    assert torch.equal(results(model), results(q))


def test_another_dtype_is_honoured(tmp_path):
    folder = saved(causal_lm(), tmp_path / "q", STATIC, batches())
    model = opened(folder, dtype=torch.bfloat16)
    assert results(model).dtype == torch.bfloat16
    assert all(one.activation_scale.dtype == torch.float32 for one in linears(model).values())
    torch.testing.assert_close(results(model).float(), results(lobcq_fx.load(folder)), rtol=0.2, atol=0.1)


def test_the_base_of_a_saved_model_is_opened_without_the_head(tmp_path):
    folder = saved(causal_lm(), tmp_path / "q")
    base, model = opened_base(folder), opened(folder)
    assert type(base) is transformers.LlamaModel
    assert torch.equal(results(base), results(model.model))


def opened_base(folder):
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    return model


def test_a_folder_of_release_0_1_is_opened_too(tmp_path):
    with tarfile.open(RELEASE_0_1) as archive:
        archive.extractall(tmp_path, filter="data")
    model, q = opened(tmp_path / "causal_lm"), lobcq_fx.load(tmp_path / "causal_lm")
    assert torch.equal(results(model, IDS % 32), results(q, IDS % 32))


def test_a_folder_with_the_notice_of_before_is_opened_too(tmp_path, monkeypatch):
    before = "a LO-BCQ model, which transformers does not open: call lobcq_fx.load(folder), of the package lobcq-fx"
    monkeypatch.setattr("lobcq_fx.storage.checkpoint.NOTICE", before)
    folder = saved(uneven(), tmp_path / "q")
    assert before in (folder / "config.json").read_text()
    assert type(opened(folder)) is transformers.LlamaForCausalLM


def test_a_masked_language_model_and_its_base(tmp_path):
    """Its head is tied to the embedding, and its bias has two names."""
    folder = saved(bert(transformers.BertForMaskedLM), tmp_path / "q")
    model, q = opened(folder, transformers.AutoModelForMaskedLM), lobcq_fx.load(folder)
    assert torch.equal(results(model), results(q))


@pytest.mark.parametrize(("mode", "dtype"), crossed(MODES, [torch.float32, torch.bfloat16]))
def test_rotated_layers_go_through_both_doors(tmp_path, mode, dtype):
    config = LobcqConfig(mode=mode, rotation="hadamard", smoothing="everywhere")
    model = uneven()
    for parameter in model.parameters():  # the rotary frequencies stay in fp32, as from_pretrained leaves them
        parameter.data = parameter.data.to(dtype)
    q = lobcq_fx.quantize(model, batches(), config, static_cache=False)
    rotated = {record.layer for record in q.inventory if record.rotated}
    q.save_pretrained(tmp_path / "q")
    model = opened(tmp_path / "q", dtype=dtype)
    assert rotated
    assert {name for name, linear in linears(model).items() if linear.settings.rotated} == rotated
    assert torch.equal(results(model), results(q))
    model.save_pretrained(tmp_path / "modules")
    assert torch.equal(results(opened(tmp_path / "modules", dtype=dtype)), results(q))


def test_a_rotation_that_no_module_does_is_refused(tmp_path):
    folder = saved(uneven(), tmp_path / "q", LobcqConfig(rotation="hadamard"), batches())
    graph = json.loads((folder / "graph.json").read_text())
    rotations = [node for node in graph["nodes"] if "rotate.default" in str(node["target"])]
    for node in rotations:
        node["args"]["tuple"][1] //= 2
    (folder / "graph.json").write_text(json.dumps(graph))
    reindex(folder)
    assert rotations
    with pytest.raises(CheckpointError, match=r"cannot be a module: its activation is rotated in arrays of 32, not 64"):
        opened(folder)


def test_a_model_with_a_quantized_cache_is_refused_by_name(tmp_path):
    """Whose results an ordinary cache would change in silence."""
    config = LobcqConfig(kv_cache="8x64")
    with pytest.raises(ConfigError, match=r"kv_cache='8x64'.*lobcq_fx\.load"):
        opened(saved(causal_lm(), tmp_path / "q", config))
    causal_lm().save_pretrained(tmp_path / "float")
    settings = lobcq_fx.LobcqQuantizationConfig(config)
    with pytest.raises(ConfigError, match=r"past_key_values=lobcq_fx\.LobcqCache\('8x64'\)"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=settings)


def test_a_quantized_tied_head_is_refused_by_name(tmp_path):
    folder = saved(causal_lm("llama-tied"), tmp_path / "q", LobcqConfig(exclude=()))
    with pytest.raises(CheckpointError, match=r"lm_head.*cannot be a module.*lobcq_fx\.load"):
        opened(folder)


def test_a_class_that_needs_more_is_refused(tmp_path):
    folder = saved(bert(), tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"BertForSequenceClassification needs classifier\.bias"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_tensor_that_was_changed_is_named(tmp_path):
    folder = saved(causal_lm(), tmp_path / "q")
    tensors = load_file(folder / "lobcq.safetensors")
    name = "model.layers.1.mlp.up_proj.weight.codes"
    tensors[name][0, 0] ^= 1
    save_file(tensors, folder / "lobcq.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is .*saved was"):
        opened(folder)


def test_a_folder_without_its_graph_is_refused(tmp_path):
    folder = saved(causal_lm(), tmp_path / "q")
    shutil.move(folder / "graph.json", tmp_path / "graph.json")
    with pytest.raises(CheckpointError, match=r"has no graph\.json.*snapshot_download"):
        opened(folder)
