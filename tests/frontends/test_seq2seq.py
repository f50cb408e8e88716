"""Encoder-decoders: `generate()` and calls against the fake-quantized original."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, EncoderDecoderCache

import lobcq_fx
from lobcq_fx.errors import CallError, CheckpointError, ConfigError, ExportError, TraceError
from lobcq_fx.export import export_onnx
from lobcq_fx.frontends.float_seq2seq import label_shift
from lobcq_fx.frontends.seq2seq_labels import shifted
from lobcq_fx.tracing.examples import calibration_inputs
from tests.families import TOKENS, VOCABULARY, fake_quantized, quantized_layers

START = {"pad_token_id": 0, "decoder_start_token_id": 3}
UNTIED = {"tie_word_embeddings": False}  # tied heads of random weights repeat the last token
T5 = {"d_model": 72, "d_ff": 172, "d_kv": 18, "num_heads": 4, "num_layers": 1, "vocab_size": VOCABULARY, **START}
BART = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
    **TOKENS,
    **START,
}
MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, **UNTIED)),
}

IDS = torch.randint(4, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
IDS[0, 6:] = 0
MASK = (IDS != 0).long()
ANSWER = torch.randint(4, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
SETTINGS = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
    "no cache": {"use_cache": False},
    "an answer begun": {"decoder_input_ids": ANSWER[:, :3]},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@cache
def quantized(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if name == "t5":  # it ties whatever its configuration says
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, T5["d_model"]))
    with torch.no_grad():
        for parameter in model.parameters():  # larger weights, so that predictions differ
            if parameter.dim() > 1:
                parameter.mul_(1.5 if name == "t5" else 4)
    return model, lobcq_fx.quantize(model)


@pytest.fixture(params=["t5", "bart"])
def pair(request, traced_once):
    return quantized(request.param)


@pytest.fixture
def bart(traced_once):
    return quantized("bart")


def generated(model, rows=slice(None), **settings):
    torch.manual_seed(5)
    return model.generate(IDS[rows], **{**SETTINGS, "attention_mask": MASK[rows], **settings})


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_fake_quantized_model(pair, way):
    model, q = pair
    rows = slice(1, 2) if way == "prompt lookup" else slice(None)
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = generated(model, rows, **WAYS[way])
    assert torch.equal(generated(q, rows, **WAYS[way]), expected)
    assert len(set(expected.flatten().tolist())) > 3


def test_the_encoder_runs_once_and_every_step_runs_the_decoder_alone(pair):
    q = pair[1]
    runs = dict.fromkeys(q.graphs, 0)

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    hooks = [one.graph_module.register_forward_hook(count(name)) for name, one in q.graphs.items()]
    generated(q, num_beams=2)
    for hook in hooks:
        hook.remove()
    assert runs == {"main": 0, "encoder": 1, "cross_attention": 1, "decoder": 8}


@torch.no_grad()
def test_labels_give_the_original_s_loss_and_decoder_tokens(pair):
    model, q = pair
    labels = ANSWER.clone()
    labels[1, 4:] = -100
    given = {"input_ids": IDS, "attention_mask": MASK}
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = model(**given, labels=labels)
    for actual in (q(**given, labels=labels), q(encoder_outputs=q.get_encoder()(**given), **given, labels=labels)):
        torch.testing.assert_close(actual.logits, expected.logits)
        torch.testing.assert_close(actual.loss, expected.loss)
        assert actual.keys() == expected.keys()


@torch.no_grad()
def test_mbart_s_decoder_begins_with_the_label_s_own_last_token():
    torch.manual_seed(0)
    model = transformers.MBartForConditionalGeneration(transformers.MBartConfig(**BART)).eval()
    assert label_shift(model, {"input_ids": IDS, "attention_mask": MASK}) == ("wrap", False)
    labels = torch.tensor([[5, 6, 7, -100, -100], [9, 8, 7, 6, 4]])
    assert shifted(labels, "wrap", 0, None).tolist() == [[7, 5, 6, 7, 0], [4, 9, 8, 7, 6]]
    assert shifted(labels, "start", 0, 3).tolist() == [[3, 5, 6, 7, 0], [3, 9, 8, 7, 6]]


@torch.no_grad()
def test_whole_calls_and_steps_agree_with_the_fake_quantized_model(pair):
    model, q = pair
    mask = torch.ones_like(ANSWER)
    mask[1, :2] = 0
    given = {"attention_mask": MASK, "decoder_input_ids": ANSWER, "decoder_attention_mask": mask}
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = model(IDS, **given)
        hidden = model.get_encoder()(input_ids=IDS, attention_mask=MASK)[0]
    whole, as_tuple = q(IDS, **given), q(IDS, **given, return_dict=False)
    assert type(whole) is type(expected)
    assert whole.keys() == expected.keys()
    assert torch.equal(as_tuple[0], whole.logits)
    torch.testing.assert_close(whole.logits, expected.logits)
    torch.testing.assert_close(whole.encoder_last_hidden_state, hidden)
    for attention in ("self_attention_cache", "cross_attention_cache"):
        caches = (getattr(one.past_key_values, attention) for one in (whole, expected))
        for actual, wanted in zip(*(one.layers for one in caches), strict=True):
            torch.testing.assert_close(actual.keys, wanted.keys)
            torch.testing.assert_close(actual.values, wanted.values)

    encoder_outputs = q.get_encoder()(input_ids=IDS, attention_mask=MASK)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    logits = []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        part = {"decoder_input_ids": ANSWER[:, start:stop], "decoder_attention_mask": mask[:, :stop]}
        logits.append(q(encoder_outputs=encoder_outputs, attention_mask=MASK, past_key_values=cache, **part).logits)
        assert cache.get_seq_length() == stop
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask.bool()], expected.logits[mask.bool()])


@torch.no_grad()
def test_what_the_encoder_s_mask_hides_changes_nothing(pair):
    q = pair[1]
    other = IDS.clone()
    other[0, 6:] = 17
    call = {"attention_mask": MASK, "decoder_input_ids": ANSWER}
    torch.testing.assert_close(q(other, **call).logits, q(IDS, **call).logits)
    assert not torch.allclose(q(other, decoder_input_ids=ANSWER).logits[0], q(IDS, **call).logits[0])
    alone = q(IDS[:1, :6], decoder_input_ids=ANSWER[:1]).logits
    torch.testing.assert_close(alone, q(IDS, **call).logits[:1], rtol=1e-3, atol=1e-3)


def test_saved_and_loaded_models_generate_the_same(pair, tmp_path):
    q = pair[1]
    q.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    assert loaded.graphs.keys() == q.graphs.keys()
    assert loaded.calling == q.calling
    assert torch.equal(generated(loaded, num_beams=3), generated(q, num_beams=3))
    names = {id(tensor) for graph in loaded.graphs.values() for tensor in graph.graph_module.buffers()}
    assert names == {id(tensor) for tensor in loaded.graph_module.buffers()}  # each weight is there once
    read = {str(node.target) for graph in loaded.graphs.values() for node in graph.stored.find_nodes(op="get_attr")}
    embeddings = [name for name in read if name.endswith(("shared.weight", "embed_tokens.weight"))]
    assert len(embeddings) == (1 if loaded.config.model_type == "t5" else 2)  # T5's parts share one


@pytest.mark.parametrize(
    "change",
    [
        {"encoder_inputs": ["attention_mask"]},
        {"decoder_inputs": ["decoder_input_ids"]},
        {"cache_dtype": "int8"},
        {"label_shift": "back"},
        {"label_shift": "start", "decoder_start_token_id": -1},
        {"hidden_size": 0},
        {"input_shape": [None]},
        {"cross_heads": [[2, 32, 32]]},
        {"guards": [["<", ["size", 9, 0], 3]]},
        {"output_type": "CausalLMOutputWithPast"},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_damaged_calling_convention_is_refused(bart, change):
    calling = type(bart[1].calling)
    values = bart[1].calling.to_dict()
    assert calling.from_dict(deepcopy(values)) == bart[1].calling
    with pytest.raises(ValueError, match=r"\w"):
        calling.from_dict({**deepcopy(values), **change})


def test_a_folder_whose_decoder_has_another_arity_is_refused(bart, tmp_path, monkeypatch):
    q = bart[1]
    saved = q.checkpoint()
    graphs = {**saved.graphs, "decoder": saved.graphs["encoder"]}
    graphs["decoder"] = type(graphs["decoder"])(graphs["decoder"].graph, saved.graphs["decoder"].calling)
    monkeypatch.setattr(q, "checkpoint", lambda: type(saved)(**{**vars(saved), "graphs": graphs}))
    with pytest.raises(CheckpointError, match="'decoder' has 2 inputs and 1 outputs"):
        q.save_pretrained(tmp_path / "q")


def test_a_folder_without_its_decoder_is_refused(bart, tmp_path, monkeypatch):
    saved = bart[1].checkpoint()
    graphs = {name: one for name, one in saved.graphs.items() if name != "decoder"}
    monkeypatch.setattr(bart[1], "checkpoint", lambda: type(saved)(**{**vars(saved), "graphs": graphs}))
    with pytest.raises(CheckpointError, match="'decoder' of an encoder-decoder is missing"):
        bart[1].save_pretrained(tmp_path / "q")


def test_a_model_that_reads_pictures_is_refused_by_name():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    decoder = transformers.BertConfig(**sizes, vocab_size=VOCABULARY)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    with pytest.raises(TraceError, match="VisionEncoderDecoderModel reads pixel_values"):
        lobcq_fx.quantize(transformers.VisionEncoderDecoderModel(config))


def filled_cache(q, rows):
    return q(IDS[:rows], decoder_input_ids=ANSWER[:rows]).past_key_values


@torch.no_grad()
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: q(IDS), "decoder_input_ids is missing"),
        (lambda q: q(decoder_input_ids=ANSWER), "input_ids is missing: pass a tensor, or encoder_outputs"),
        (lambda q: q(IDS, decoder_input_ids=ANSWER[:2]), "2 sequences and input_ids 3"),
        (lambda q: q(IDS, MASK[:, 1:], ANSWER), r"attention_mask is a torch.int64 of \[3, 8\]: pass \[3, 9\]"),
        (lambda q: q(IDS, MASK, ANSWER, MASK), r"decoder_attention_mask .* pass \[3, 6\]"),
        (lambda q: q(IDS, decoder_input_ids=ANSWER, past_key_values=DynamicCache()), "pass EncoderDecoderCache"),
        (lambda q: q(IDS, decoder_input_ids=ANSWER, output_attentions=True), "'output_attentions' is not supported"),
        (lambda q: q(IDS.float(), decoder_input_ids=ANSWER), "input_ids is a torch.float32"),
        (lambda q: q(encoder_outputs=(IDS,), decoder_input_ids=ANSWER), "pass what get_encoder"),
        (
            lambda q: q(IDS, decoder_input_ids=ANSWER, past_key_values=filled_cache(q, 2)),
            r"states of \[2, 2, 6, 32\]; this call's are \[3, 2, any, 32\]",
        ),
        (lambda q: q.generate(inputs_embeds=torch.zeros(3, 9, 64)), "'inputs_embeds' is not supported"),
        (lambda q: generated(q, cache_implementation="static"), "leave cache_implementation out"),
    ],
)
def test_calls_that_the_graphs_cannot_serve_are_refused(bart, call, message):
    with pytest.raises(CallError, match=message):
        call(bart[1])


@torch.no_grad()
def test_a_step_compiles_whole_and_once(bart):
    q = bart[1]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend=counter)
    ids = torch.cat((ANSWER, ANSWER), dim=1)  # every size is another, so that none stands for two
    given = {"encoder_outputs": q.get_encoder()(input_ids=IDS, attention_mask=MASK), "attention_mask": MASK}
    cache = q(**given, decoder_input_ids=ids[:, :7]).past_key_values
    expected = q(IDS, MASK, ids).logits
    for step in range(7, 10):
        logits = compiled(**given, decoder_input_ids=ids[:, step : step + 1].clone(), past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, step])
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_labels_of_calibration_data_become_the_decoder_s_tokens(bart):
    calling = bart[1].calling
    given = {"input_ids": IDS, "attention_mask": MASK}
    tokens = torch.cat((torch.full((3, 1), 3), ANSWER[:, :-1]), dim=1)
    pair = [
        calibration_inputs(calling, {**given, **one}, IDS.device)
        for one in ({"labels": ANSWER}, {"decoder_input_ids": tokens})
    ]
    assert all(torch.equal(one, other) for one, other in zip(*pair, strict=True))


@torch.no_grad()
def test_the_parts_of_a_calibrated_model_compute_what_the_whole_does(bart):
    data = [{"input_ids": IDS, "attention_mask": MASK, "labels": ANSWER}]
    q = lobcq_fx.quantize(bart[0], data, recipe="best")
    encoder_outputs = q.get_encoder()(input_ids=IDS, attention_mask=MASK)
    by_parts = q(encoder_outputs=encoder_outputs, attention_mask=MASK, decoder_input_ids=ANSWER).logits
    torch.testing.assert_close(by_parts, q(IDS, MASK, ANSWER).logits)
    assert any(name.endswith("input_scale") for name in q.state_dict())


def test_what_is_not_there_for_encoder_decoders_is_refused_with_what_is(bart, tmp_path):
    model, q = bart
    with pytest.raises(ConfigError, match="kv_cache"):
        lobcq_fx.quantize(model, config=lobcq_fx.LobcqConfig(kv_cache="8x64"))
    with pytest.raises(ExportError, match=r"BartForConditionalGeneration.*model\.get_encoder\(\)"):
        export_onnx(q, tmp_path / "onnx")
