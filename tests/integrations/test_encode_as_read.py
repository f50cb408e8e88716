"""`from_pretrained(float folder, quantization_config=...)`: what `quantize` does without data, as weights are read."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lobcq_fx
from lobcq_fx import LobcqConfig, LobcqQuantizationConfig
from lobcq_fx.errors import CalibrationError, CheckpointError, ConfigError
from lobcq_fx.modules.lobcq_convolution import LobcqConvolution
from lobcq_fx.modules.lobcq_linear import LobcqLinear
from tests.integrations.models import GREEDY, IDS, bert, causal_lm, opened, results, saved
from tests.sweeps import sweep

FORMATS = LobcqConfig(
    format="2x128", exclude=("@head", "*.1.*"), overrides={"*up_proj": {"mode": "w4a8"}, "*o_proj": {"format": "16x16"}}
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    causal_lm().save_pretrained(folder)
    return folder


def quantized_as_read(folder, config=None, kind=transformers.AutoModelForCausalLM, **settings):
    return opened(folder, kind, quantization_config=LobcqQuantizationConfig(config), **settings)


def layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, LobcqLinear)}


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


def assert_as_quantized(model, q):
    """The same layers, with the same bytes, and the same results."""
    assert layers(model) == {record.layer for record in q.inventory.quantized}
    state, expected = model.state_dict(), q.state_dict()
    for name in (
        f"{layer}.weight.{part}" for layer in layers(model) for part in ("codes", "selectors", "tensor_scale")
    ):
        assert torch.equal(state[name], expected[name]), name
    assert torch.equal(results(model), results(q))


@pytest.mark.parametrize("mode", sweep(["w4a4", "w4a8", "w4a16"], ["w4a4", "w4a8"]))
def test_it_is_what_quantize_makes(llama, mode):
    model = quantized_as_read(llama, LobcqConfig(mode=mode))
    q = lobcq_fx.quantize(causal_lm(), config=LobcqConfig(mode=mode), static_cache=False)
    assert type(model) is transformers.LlamaForCausalLM
    assert_as_quantized(model, q)
    assert torch.equal(model.generate(IDS, **GREEDY), q.generate(IDS, **GREEDY))


def test_patterns_and_overrides_hold_as_in_quantize(llama):
    model = quantized_as_read(llama, FORMATS)
    assert_as_quantized(model, lobcq_fx.quantize(causal_lm(), config=FORMATS, static_cache=False))
    attention = model.model.layers[0].self_attn
    assert (attention.o_proj.settings.spec.name, attention.q_proj.settings.spec.name) == ("16x16", "2x128")
    assert model.model.layers[0].mlp.up_proj.settings.mode == "w4a8"


def test_the_dtype_is_honoured(llama):
    model = quantized_as_read(llama, dtype=torch.bfloat16)
    assert model.dtype == results(model).dtype == torch.bfloat16
    float_model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    assert_as_quantized(model, lobcq_fx.quantize(float_model, static_cache=False))


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "opt"])
def test_families(tmp_path, family):
    causal_lm(family).save_pretrained(tmp_path)
    assert_as_quantized(quantized_as_read(tmp_path), lobcq_fx.quantize(causal_lm(family), static_cache=False))


def test_the_head_of_a_classifier_stays_in_float(tmp_path):
    bert(transformers.BertForSequenceClassification).save_pretrained(tmp_path)
    exclude = LobcqConfig(exclude=("@head",))
    model = quantized_as_read(tmp_path, exclude, transformers.AutoModelForSequenceClassification)
    assert type(model.classifier) is torch.nn.Linear
    assert_as_quantized(model, lobcq_fx.quantize(bert(transformers.BertForSequenceClassification), config=exclude))


def test_codebooks_of_a_file(llama, tmp_path):
    codebooks = lobcq_fx.format.universal_codebooks(8).flip(0).tolist()
    (tmp_path / "sets.json").write_text(json.dumps({"codebooks": {"8": codebooks}}))
    model = quantized_as_read(llama, LobcqConfig(codebooks=str(tmp_path / "sets.json")))
    assert model.model.layers[0].mlp.up_proj.codebooks.tolist() == codebooks


def test_settings_come_as_a_dictionary_too(llama):
    config = {"quant_method": "lobcq", "lobcq_config": {"mode": "w4a16"}}
    model = opened(llama, quantization_config=config)
    assert model.model.layers[0].mlp.up_proj.settings.mode == "w4a16"


@pytest.mark.parametrize("config", [None, FORMATS], ids=["defaults", "formats"])
def test_what_is_saved_is_opened_again(llama, tmp_path, config):
    model = quantized_as_read(llama, config)
    model.save_pretrained(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert layers(again) == layers(model)
    assert torch.equal(results(again), results(model))
    again.save_pretrained(tmp_path / "once more")
    assert (tmp_path / "once more" / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "once more"))
    assert first.keys() == second.keys()
    assert all(torch.equal(bits(first[name]), bits(second[name])) for name in first)


def test_settings_serve_several_models(llama, tmp_path):
    causal_lm("qwen2").save_pretrained(tmp_path / "qwen2")
    config = LobcqQuantizationConfig()
    first = opened(llama, quantization_config=config)
    opened(tmp_path / "qwen2", quantization_config=config)
    assert config.layers is None
    assert first.config.quantization_config.layers.keys() == layers(first)


@pytest.mark.parametrize("target", ["modules", "graph"], ids=["elsewhere", "in place"])
def test_a_graph_folder_that_is_saved_as_modules_is_opened_again(tmp_path, target):
    model = opened(saved(causal_lm(), tmp_path / "graph"))
    model.save_pretrained(tmp_path / target)
    assert torch.equal(results(opened(tmp_path / target)), results(model))
    with pytest.raises(CheckpointError, match="as modules"):
        lobcq_fx.load(tmp_path / target)


def test_the_base_of_saved_modules_is_opened_without_the_head(llama, tmp_path):
    model = quantized_as_read(llama)
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(results(base), results(model.model))


def test_load_says_what_saved_modules_are(llama, tmp_path):
    quantized_as_read(llama).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"as modules.*from_pretrained"):
        lobcq_fx.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"smoothing": "folded"}, "smoothing='folded'"),
        ({"rotation": "hadamard"}, "rotation='hadamard'"),
        ({"codebooks": "fitted", "rounding": "compensated"}, "codebooks='fitted', rounding='compensated'"),
        ({"overrides": {"*": {"activation_scale": "static"}}}, "activation_scale='static'"),
        ({"bits": 4.5}, r"bits=4\.5"),
    ],
)
def test_what_needs_data_is_refused_by_name(llama, settings, named):
    with pytest.raises(CalibrationError, match=f"{named} need calibration data.*lobcq_fx.quantize"):
        quantized_as_read(llama, LobcqConfig(**settings))


def test_settings_that_leave_nothing_are_refused(llama):
    with pytest.raises(ConfigError, match=r"nothing to quantize in LlamaForCausalLM.*matched by no include pattern"):
        quantized_as_read(llama, LobcqConfig(include=("*nowhere",)))


def test_a_class_derived_from_linear_is_left_alone_and_named(tmp_path):
    causal_lm("falcon").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"query_key_value: FalconLinear is no plain linear.*lobcq_fx\.quantize"):
        quantized_as_read(tmp_path)


def vit():
    """transformers renames its tensors as it reads and writes them."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config).eval()


@torch.no_grad()
def test_a_model_whose_tensors_have_other_names_in_files(tmp_path):
    kind, pixels = transformers.AutoModelForImageClassification, torch.randn(2, 3, 32, 32)
    vit().save_pretrained(tmp_path / "float")
    model = quantized_as_read(tmp_path / "float", kind=kind)
    q = lobcq_fx.quantize(vit())
    q.save_pretrained(tmp_path / "graph")
    model.save_pretrained(tmp_path / "modules")
    assert len(layers(model)) == 7, "six linears and the patch embedding"
    expected = q(pixel_values=pixels).logits
    assert torch.equal(model(pixels).logits, expected)
    for folder in ("graph", "modules"):
        assert torch.equal(opened(tmp_path / folder, kind)(pixels).logits, expected), folder


@torch.no_grad()
def test_a_patch_embedding_is_asked_for_the_dtype_of_its_images(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    float_model = transformers.CLIPVisionModel(config).eval().bfloat16()
    float_model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    expected = lobcq_fx.quantize(float_model)(pixel_values=pixels.bfloat16())[0]
    model = quantized_as_read(tmp_path, kind=transformers.CLIPVisionModel, dtype=torch.bfloat16)
    assert torch.equal(model(pixel_values=pixels)[0], expected)
    assert torch.equal(lobcq_fx.optimize(model)(pixel_values=pixels.bfloat16())[0], expected)
    embedding = next(module for module in model.modules() if isinstance(module, LobcqConvolution))
    assert embedding.weight.dtype == torch.bfloat16
    assert embedding.float().weight.dtype == torch.float32


def test_saved_modules_in_many_files(llama, tmp_path):
    model = quantized_as_read(llama)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(results(opened(tmp_path)), results(model))


def test_a_tied_head_is_refused_by_name(tmp_path):
    causal_lm("llama-tied").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is the embedding's too"):
        quantized_as_read(tmp_path, LobcqConfig(exclude=()))


def changed(folder, change):
    """Rewrite the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_weight_that_never_comes_is_named(tmp_path):
    causal_lm().save_pretrained(tmp_path)
    changed(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"no model\.layers\.1\.mlp\.up_proj\.weight of its own"):
        quantized_as_read(tmp_path)


def test_a_weight_with_nan_is_refused(tmp_path):
    causal_lm().save_pretrained(tmp_path)
    changed(tmp_path, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan))
    with pytest.raises(RuntimeError, match=r"conversion of the weights"):
        quantized_as_read(tmp_path)


def test_saved_modules_with_a_scale_that_is_no_number_are_refused(llama, tmp_path):
    quantized_as_read(llama).save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    changed(tmp_path, lambda tensors: tensors[f"{name}.scales"].view(torch.uint8).fill_(0x7F))
    with pytest.raises(CheckpointError, match=f"{name}.scales holds NaN"):
        opened(tmp_path)


def test_saved_modules_that_lack_a_tensor_are_refused(llama, tmp_path):
    quantized_as_read(llama).save_pretrained(tmp_path)
    changed(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight.codes"))
    with pytest.raises(CheckpointError, match=r"lacks .*model\.layers\.1\.mlp\.up_proj\.weight\.codes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_saved_modules_of_another_version_are_refused(llama, tmp_path):
    quantized_as_read(llama).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format version 99"):
        opened(tmp_path)


def test_weights_on_disk_are_refused(llama):
    pytest.importorskip("accelerate", reason="accelerate, which transformers maps devices with, is not installed")
    with pytest.raises(ConfigError, match="not left on disk"):
        quantized_as_read(llama, device_map={"": "disk"})
