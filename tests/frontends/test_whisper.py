"""Whisper: its own `generate()`, on recordings of one window and of several, against the fake-quantized original."""

from __future__ import annotations

import shutil
import subprocess
import wave

import pytest
import torch
import transformers

import lobcq_fx
from lobcq_fx.errors import CallError, TraceError
from tests.families import TOKENS, VOCABULARY, fake_quantized, quantized_layers

BINS, FRAMES = 8, 40
SIZES = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_mel_bins": BINS,
    "max_source_positions": FRAMES // 2,
    "max_target_positions": 64,
    "decoder_start_token_id": 3,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
START = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
GENERATION = {"no_timestamps_token_id": 79, "is_multilingual": False, "alignment_heads": [[0, 1]]}
SHORT, LONG = (torch.randn(2, BINS, n, generator=torch.Generator().manual_seed(n)) for n in (FRAMES, 100))
SEVERAL = {"attention_mask": torch.ones(2, 100, dtype=torch.long), "return_timestamps": True}
WAYS = {
    "greedy": (SHORT, {}),
    "beams": (SHORT, {"num_beams": 3}),
    "time stamps": (SHORT, {"return_timestamps": True}),
    "several windows": (LONG, SEVERAL),
    "what was heard before as a prompt": (LONG, {**SEVERAL, "condition_on_prev_tokens": True}),
    "warmer tries": (LONG, {**SEVERAL, "temperature": (0.0, 0.4), "compression_ratio_threshold": 1.35}),
}


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SIZES, **TOKENS)).eval()
    model.proj_out.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 64))  # tied, it would repeat the last token
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.generation_config = transformers.GenerationConfig(**START, **GENERATION)
    return model, lobcq_fx.quantize(model)


def transcribed(model, way):
    features, settings = WAYS[way]
    torch.manual_seed(1)
    return model.generate(features, max_new_tokens=8, **settings)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_fake_quantized_model(pair, way):
    model, q = pair
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = transcribed(model, way)
    assert len(set(expected.flatten().tolist())) > 2
    assert torch.equal(transcribed(q, way), expected)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng, which speaks")
def test_what_a_voice_says_is_transcribed_as_by_the_fake_quantized_model(pair, tmp_path):
    model, q = pair
    features, mask = spoken("Four bits are enough for all of these words", tmp_path / "voice.wav")
    settings = {"attention_mask": mask, "return_timestamps": True, "max_new_tokens": 8}
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = model.generate(features, **settings)
    assert len(set(expected.flatten().tolist())) > 2
    assert torch.equal(q.generate(features, **settings), expected)


def spoken(text, path):
    """Features of a second of speech, as Whisper's own extractor makes them, and their mask."""
    subprocess.run(["espeak-ng", "-w", str(path), text], check=True)
    with wave.open(str(path)) as file:
        rate, content = file.getframerate(), bytearray(file.readframes(file.getnframes()))
    samples = torch.frombuffer(content, dtype=torch.int16).float()[None, None] / 32768
    samples = torch.nn.functional.interpolate(samples, scale_factor=16000 / rate, mode="linear")[0, 0, :16000]
    assert samples.std() > 0.01
    extractor = transformers.WhisperFeatureExtractor(feature_size=BINS, chunk_length=1)
    found = extractor(samples.numpy(), sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    return found["input_features"], found["attention_mask"]


@torch.no_grad()
def test_calls_agree_with_the_fake_quantized_model(pair):
    model, q = pair
    labels = torch.randint(4, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = model(SHORT, labels=labels)
    for actual in (q(SHORT, labels=labels), q(encoder_outputs=q.get_encoder()(input_features=SHORT), labels=labels)):
        torch.testing.assert_close(actual.logits, expected.logits)
        torch.testing.assert_close(actual.loss, expected.loss)
    positions = torch.arange(6).flip(0)[None]
    call = {"decoder_input_ids": labels, "decoder_position_ids": positions}
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = model(SHORT, **call)
    torch.testing.assert_close(q(SHORT, **call).logits, expected.logits)


def test_saved_and_loaded_models_transcribe_the_same(pair, tmp_path):
    q = pair[1]
    q.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    assert type(loaded) is type(q)
    for way in ("beams", "several windows"):
        assert torch.equal(transcribed(loaded, way), transcribed(q, way))


def test_convolutions_are_listed_as_float(pair):
    left = {record.layer: record.reason for record in pair[1].inventory.left_alone}
    assert "convolution" in left["model.encoder.conv1"]
    assert left["proj_out"] == "excluded by pattern '@head'"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: q(SHORT[..., 1:], decoder_input_ids=torch.ones(2, 3, dtype=torch.long)), r"\[any, 8, 40\]"),
        (lambda q: q.generate(SHORT, return_token_timestamps=True), "'output_attentions' is not supported"),
        (lambda q: q.generate(SHORT, cache_implementation="static"), "leave cache_implementation out"),
    ],
)
def test_what_the_graphs_cannot_do_is_refused(pair, call, message):
    with pytest.raises(CallError, match=message):
        call(pair[1])


def test_other_models_of_speech_are_refused_by_name():
    sizes = {
        key: value for key, value in SIZES.items() if not key.endswith(("bins", "suppress_tokens", "source_positions"))
    }
    config = transformers.Speech2TextConfig(**sizes, input_feat_per_channel=BINS, conv_channels=32, **TOKENS)
    model = transformers.Speech2TextForConditionalGeneration(config).eval()
    with pytest.raises(TraceError, match=r"Speech2TextForConditionalGeneration.*pass example_inputs"):
        lobcq_fx.quantize(model)
