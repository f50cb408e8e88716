"""optimize(): models that `from_pretrained` opened become graphs, with the modules' numbers."""

from __future__ import annotations

import pytest
import torch
import transformers

import lobcq_fx
from lobcq_fx import LobcqConfig, LobcqQuantizationConfig
from lobcq_fx.errors import ConfigError
from lobcq_fx.graph.stored_linear import stored_linears
from tests.frontends.test_experts import float_model
from tests.integrations.models import GREEDY, IDS, batches, bert, causal_lm, opened, results, saved, uneven

UNLIKE = ("weight_sqnr_db", "activation_sqnr_db", "operation", "unreached", "undersampled", "smoothing")
"""What an optimized model's records do not know, or call by another name."""


def records(q):
    return [
        {key: value for key, value in record.items() if key not in UNLIKE}
        for record in q.inventory.to_dict()["records"]
    ]


def as_read(model, folder, config=None, kind=transformers.AutoModelForCausalLM, **settings):
    model.save_pretrained(folder)
    return opened(folder, kind, quantization_config=LobcqQuantizationConfig(config), **settings)


OVERRIDES = {"*mlp*": {"mode": "w4a16", "format": "2x128"}, "*.o_proj": {"mode": "w4a8"}}


@pytest.mark.parametrize(
    ("config", "static_cache"),
    [(LobcqConfig(), True), (LobcqConfig(exclude=("@head", "*.k_proj"), overrides=OVERRIDES), False)],
    ids=["defaults", "overrides"],
)
def test_a_float_folder_becomes_what_quantize_makes(tmp_path, config, static_cache):
    model = as_read(causal_lm(), tmp_path / "float", config)
    before = results(model)
    q = lobcq_fx.optimize(model, static_cache=static_cache)
    expected = lobcq_fx.quantize(causal_lm(), config=config, static_cache=static_cache)
    assert q.graphs.keys() == expected.graphs.keys()
    assert records(q) == records(expected)
    assert q.inventory.bits_per_scalar == expected.inventory.bits_per_scalar
    assert q.state_dict().keys() == expected.state_dict().keys()
    for reference in (expected, model):
        assert torch.equal(results(q), results(reference))
        assert torch.equal(q.generate(IDS, **GREEDY), reference.generate(IDS, **GREEDY))
    assert torch.equal(results(model), before)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts(tmp_path, family):
    model = as_read(float_model(family), tmp_path / "float", LobcqConfig(mode="w4a8"))
    q = lobcq_fx.optimize(model, static_cache=False)
    assert records(q) == records(lobcq_fx.quantize(float_model(family), config=model_config(model), static_cache=False))
    assert torch.equal(results(q), results(model))
    assert torch.equal(q.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


def model_config(model):
    return model.config.quantization_config.lobcq_config


@pytest.mark.parametrize(
    ("recipe", "settings"), [("balanced", {"activation_scale": "static"}), ("best", {})], ids=["static", "rotated"]
)
def test_a_calibrated_folder_and_what_is_saved(tmp_path, recipe, settings):
    config = LobcqConfig.of_recipe(recipe, smoothing="everywhere", **settings)
    folder = saved(uneven(), tmp_path / "q", config, batches())
    model = opened(folder)
    q = lobcq_fx.optimize(model, static_cache=False)
    assert any(one["rotated"] for one in records(q)) == (recipe == "best")
    assert torch.equal(results(q), results(lobcq_fx.load(folder)))
    q.save_pretrained(tmp_path / "optimized")
    again = lobcq_fx.load(tmp_path / "optimized")
    assert again.lobcq_config == q.lobcq_config == config
    assert torch.equal(results(again), results(model))
    assert torch.equal(results(opened(tmp_path / "optimized")), results(model))


def test_an_encoder_in_bf16(tmp_path):
    model = as_read(bert(), tmp_path, kind=transformers.AutoModel, dtype=torch.bfloat16)
    q = lobcq_fx.optimize(model)
    assert q.dtype == torch.bfloat16
    assert torch.equal(results(q), results(model))


def test_an_encoder_decoder_that_generates(tmp_path):
    """Its graph is cut into parts, which generation runs."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 1, "vocab_size": 61}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    model = as_read(t5, tmp_path, kind=transformers.AutoModelForSeq2SeqLM)
    q = lobcq_fx.optimize(model)
    assert q.graphs.keys() == {"main", "encoder", "cross_attention", "decoder"}
    beams = {**GREEDY, "num_beams": 2}
    assert torch.equal(q.generate(IDS, **beams), model.generate(IDS, **beams))


def test_activations_are_encoded_once_and_codebooks_stored_once(tmp_path):
    q = lobcq_fx.optimize(as_read(causal_lm(), tmp_path), static_cache=False)
    linears = {one.weight: one for one in stored_linears(q.stored_graph)}
    attention = "model.layers.0.self_attn"
    encoders = {linears[f"{attention}.{name}.weight"].encoder for name in ("q_proj", "k_proj", "v_proj")}
    assert len(encoders) == 1
    assert [name for name in q.state_dict() if "codebooks" in name] == ["lobcq.codebooks"]


def test_a_float_model_is_refused():
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no packed linears.*lobcq_fx\.quantize"):
        lobcq_fx.optimize(causal_lm())
