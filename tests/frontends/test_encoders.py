"""Hugging Face encoders: BERT, ViT and T5's encoder against their fake-quantized originals."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers

import lobcq_fx
from lobcq_fx.errors import CallError, TraceError
from tests.families import ONE_LAYER, TOKENS, VOCABULARY, fake_quantized, quantized_layers, trace_main

BERT = {"hidden_size": 72, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert():
    return transformers.BertModel(transformers.BertConfig(**BERT, vocab_size=VOCABULARY, max_position_embeddings=64))


def vit():
    config = transformers.ViTConfig(**BERT, image_size=16, patch_size=4, num_channels=3)
    return transformers.ViTForImageClassification(config)


def t5_encoder():
    config = transformers.T5Config(
        d_model=72, d_ff=172, d_kv=18, num_heads=4, num_layers=2, vocab_size=VOCABULARY, decoder_start_token_id=0
    )
    return transformers.T5EncoderModel(config)


def tokens(batch, length):
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def images(batch, length):
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))}


CASES = {"bert": (bert, tokens), "vit": (vit, images), "t5-encoder": (t5_encoder, tokens)}


@cache
def quantized(name):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    return model, lobcq_fx.quantize(model), inputs


@pytest.fixture(params=list(CASES))
def case(request):
    return quantized(request.param)


@cache
def with_hidden_states():
    """By an example that says so."""
    model = bert().eval()
    return model, lobcq_fx.quantize(model, example_inputs={**tokens(2, 5), "output_hidden_states": True})


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(2, 5), (1, 9), (4, 2)])
def test_outputs_agree_with_the_fake_quantized_model(case, batch, length):
    model, q, inputs = case
    call = inputs(batch, length)
    assert len(quantized_layers(q)) >= 12
    with fake_quantized(model, quantized_layers(q)):
        expected = model(**call)
    actual = q(**call)
    assert type(actual) is type(expected)
    assert actual[0].shape == expected[0].shape
    assert (actual[0] - expected[0]).norm() < 1e-3 * expected[0].norm()
    assert (model(**call)[0] - expected[0]).norm() > 4e-3 * expected[0].norm()


def test_saved_and_loaded_outputs_are_bit_identical(case, tmp_path):
    _, q, inputs = case
    q.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    call = inputs(3, 7)
    expected, actual = q(**call), loaded(**call)
    assert type(actual) is type(expected)
    assert torch.equal(actual[0], expected[0])


@torch.no_grad()
def test_a_call_may_leave_out_what_the_model_has_defaults_for():
    model, q, _ = quantized("bert")
    call = tokens(2, 5)
    token_types = {"token_type_ids": torch.ones(2, 5, dtype=torch.long)}
    for given in (call, {"input_ids": call["input_ids"]}, {**call, **token_types}):
        with fake_quantized(model, quantized_layers(q)):
            expected = model(**given)[0]
        torch.testing.assert_close(q(**given)[0], expected, rtol=1e-4, atol=1e-4)


def test_what_stays_in_float_is_listed_with_its_reason():
    _, q, _ = quantized("vit")
    reasons = {record.layer: record.reason for record in q.inventory.left_alone}
    assert reasons["classifier"] == "excluded by pattern '@head'"
    assert "vit.embeddings.patch_embeddings.projection" in quantized_layers(q)
    assert any("activation x activation" in reason for reason in reasons.values())


def test_example_inputs_choose_the_traced_arguments():
    model = bert().eval()
    call = {**tokens(2, 5), "token_type_ids": torch.ones(2, 5, dtype=torch.long)}
    q = lobcq_fx.quantize(model, example_inputs=call)
    with torch.no_grad(), fake_quantized(model, quantized_layers(q)):
        expected = model(**call)[0]
    torch.testing.assert_close(q(**call)[0], expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_decoder_is_refused_with_what_to_quantize_instead():
    config = transformers.T5Config(d_model=16, d_ff=32, d_kv=4, num_heads=4, num_layers=1, vocab_size=VOCABULARY)
    with pytest.raises(TraceError, match="encoder-decoder that generates nothing"):
        lobcq_fx.quantize(transformers.T5Model(config))


def bart():
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    config = transformers.BartConfig(d_model=64, vocab_size=VOCABULARY, **sizes, **heads, pad_token_id=0)
    return transformers.BartForConditionalGeneration(config).eval()


@torch.no_grad()
def test_the_encoder_of_an_encoder_decoder_is_quantized_and_generates_with_the_rest_of_it(tmp_path):
    model = bart()
    encoder = model.get_encoder()
    q = lobcq_fx.quantize(encoder)
    q.save_pretrained(tmp_path / "q")
    call = tokens(3, 7)
    with fake_quantized(encoder, quantized_layers(q), exact=True):
        expected = encoder(**call)
        words = model.generate(**call, max_new_tokens=4, do_sample=False)
    for one in (q, lobcq_fx.load(tmp_path / "q")):
        output = one(**call)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-3, atol=1e-3)
        given = {"attention_mask": call["attention_mask"], "encoder_outputs": output}
        assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), words)


def whisper_encoder():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
    config = transformers.WhisperConfig(d_model=64, max_source_positions=20, **sizes, **heads, **TOKENS)
    return transformers.WhisperModel(config).get_encoder(), {"input_features": torch.randn(2, 8, 40)}


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16], depths=[1, 1], out_features=["stage2"], layer_type="basic"
    )
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "d_model": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 5}
    config = transformers.DetrConfig(use_timm_backbone=False, backbone_config=backbone, **sizes, **heads)
    return transformers.DetrForObjectDetection(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


@torch.no_grad()
@pytest.mark.parametrize("make", [whisper_encoder, detr])
def test_other_models_that_say_encoder_decoder_and_are_called_once(make):
    torch.manual_seed(0)
    model, call = make()
    assert model.eval().config.is_encoder_decoder
    with pytest.raises(TraceError, match=rf"{model.main_input_name}.*pass example_inputs=\{{'{model.main_input_name}'"):
        trace_main(model)
    traced = trace_main(model, call)
    other = {name: value.flip(0) + 0.5 for name, value in call.items()}
    outputs = traced.graph_module(*traced.calling.flatten((), other))
    actual, expected = traced.calling.unflatten(outputs, (), other), model(**other)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual[0], expected[0])


def test_a_classifier_without_a_padding_token_is_refused_with_what_to_set():
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**{**ONE_LAYER, "pad_token_id": None}))
    with pytest.raises(TraceError, match=r"no padding token is defined\. Remedy: set model\.config\.pad_token_id"):
        lobcq_fx.quantize(model, example_inputs={"input_ids": torch.arange(5)[None]})


@torch.no_grad()
@pytest.mark.usefixtures("traced_once")
def test_labels_are_ignored_in_calibration_data():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=VOCABULARY, **sizes)).eval()
    config = lobcq_fx.LobcqConfig(activation_scale="static")
    plain = [tokens(2, 5), tokens(3, 7)]
    labelled = [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)} for batch in plain]
    q, expected = (lobcq_fx.quantize(model, data, config) for data in (labelled, plain))
    assert torch.equal(q(**plain[0]).logits, expected(**plain[0]).logits)
    with pytest.raises(CallError, match="argument 'labels' was not in the traced call"):
        q(**labelled[0])


def test_a_call_may_say_what_the_graph_was_traced_with(case):
    _, q, inputs = case
    call = inputs(2, 5)
    expected = q(**call)
    said = q(**call, return_dict=True, output_hidden_states=False, output_attentions=None)
    assert type(said) is type(expected)
    assert torch.equal(said[0], expected[0])
    for other in ({"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}):
        with pytest.raises(CallError, match=f"argument {next(iter(other))!r} is .*traced with"):
            q(**call, **other)


def test_what_the_example_says_is_part_of_the_graph(tmp_path):
    _, q = with_hidden_states()
    q.save_pretrained(tmp_path)
    loaded = lobcq_fx.load(tmp_path)
    states = loaded(**tokens(2, 5), output_hidden_states=True, return_dict=True).hidden_states
    assert len(states) == BERT["num_hidden_layers"] + 1
    with pytest.raises(CallError, match="'output_hidden_states' is False"):
        loaded(**tokens(2, 5), output_hidden_states=False)


def test_tracing_leaves_what_the_float_model_returns():
    model, _ = with_hidden_states()
    call = {**tokens(2, 5), "output_hidden_states": True}
    assert len(model(**call).hidden_states) == BERT["num_hidden_layers"] + 1
