"""quantize(): settings, calibration data in all its forms, and what is refused."""

from __future__ import annotations

import gc
import json

import pytest
import torch
import transformers
from torch import nn

import lobcq_fx
from lobcq_fx import FormatSpec, LobcqConfig
from lobcq_fx.errors import CalibrationError, ConfigError, LobcqError, TraceError
from lobcq_fx.format import decode, encode, encode_int8, sqnr_db, universal_codebooks
from lobcq_fx.pipeline import fit_shared_codebooks
from tests.families import VOCABULARY, causal_lm, fake_quantized, quantized_layers


class Mlp(nn.Module):
    """Two linears with a 44-column tail, and one that is never reached unless asked for."""

    def __init__(self, features=172):
        super().__init__()
        self.up = nn.Linear(64, features)
        self.down = nn.Linear(features, 64, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def mlp(seed=0):
    torch.manual_seed(seed)
    return Mlp().eval()


def batches(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 64, generator=generator) for _ in range(count)]


def token_batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in torch.randint(3, VOCABULARY, (count, 2, 9), generator=generator)
    ]


@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
@pytest.mark.parametrize("name", ["8x64", "16x128", "2x32", "1x16"])
def test_every_format_and_mode_matches_the_fake_quantized_module(mode, name):
    model, spec = mlp(), FormatSpec.from_name(name)
    q = lobcq_fx.quantize(model, config=LobcqConfig(format=spec, mode=mode), example_inputs=batches()[0])
    x = batches(seed=5)[0]
    with fake_quantized(model, ["up", "down"], spec, mode=mode):
        expected = model(x)
    torch.testing.assert_close(q(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", ["per_token", "static"])
def test_errors_of_int8_activations_are_measured_in_the_scales_they_get(scale):
    x, model = batches(count=1)[0], mlp()
    x = x / x.abs().amax(1, keepdim=True)  # so that each row counts as much as it does in its own scale
    q = lobcq_fx.quantize(model, [x], LobcqConfig(mode="w4a8", activation_scale=scale))
    expected = encode_int8(x, 64, x.abs().max() / 56896 if scale == "static" else None)
    assert q.inventory.records[0].activation_sqnr_db == pytest.approx(sqnr_db(x, expected), abs=0.01)


def test_overrides_give_layers_settings_of_their_own():
    config = LobcqConfig(overrides={"up": {"format": "16x32"}, "down": {"mode": "w4a16"}})
    q = lobcq_fx.quantize(mlp(), config=config, example_inputs=batches()[0])
    settings = {record.layer: (record.format, record.mode) for record in q.inventory}
    assert settings == {"up": ("16x32", "w4a4"), "down": ("8x64", "w4a16")}
    assert {"lobcq.codebooks", "lobcq.codebooks_1"} <= set(q.state_dict())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: batches(), id="tensors"),
        pytest.param(lambda: [(x,) for x in batches()], id="tuples"),
        pytest.param(lambda: [{"x": x} for x in batches()], id="mappings"),
        pytest.param(lambda: (x for x in batches()), id="generator"),
        pytest.param(lambda: torch.utils.data.DataLoader(torch.cat(batches()), batch_size=8), id="DataLoader"),
    ],
)
def test_static_scales_come_from_the_whole_calibration_data(data):
    q = lobcq_fx.quantize(mlp(), data(), LobcqConfig(activation_scale="static"))
    largest = max(float(x.abs().max()) for x in batches())
    assert float(q.state_dict()["up.activation_scale"]) == pytest.approx(largest / 13888, rel=1e-6)
    records = {record.layer: record for record in q.inventory}
    assert 15 < records["up"].activation_sqnr_db < 35


def test_static_scales_are_what_the_model_encodes_with():
    model = mlp()
    q = lobcq_fx.quantize(model, batches(), LobcqConfig(activation_scale="static", include=["up"]))
    x = batches(seed=9)[0]
    codebooks = universal_codebooks(8)
    a = decode(encode(x, FormatSpec(), codebooks, q.state_dict()["up.activation_scale"]))
    w = decode(encode(model.up.weight.detach(), FormatSpec(), codebooks, search_scales=True))
    expected = model.down(torch.relu(nn.functional.linear(a, w, model.up.bias)))
    torch.testing.assert_close(q(x), expected, rtol=1e-4, atol=1e-5)


def test_siblings_share_one_encoded_activation_with_static_scales_too():
    q = lobcq_fx.quantize(
        causal_lm("llama"), token_batches(), LobcqConfig(activation_scale="static"), static_cache=False
    )
    nodes = [n for n in q.stored_graph.nodes if n.target is torch.ops.lobcq.quantize_activation.default]
    assert len(nodes) == 2 * 4  # q/k/v, o, gate/up, down in each of two layers


def test_fitted_codebooks_beat_the_universal_ones_on_unusual_weights(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False)).eval()
    with torch.no_grad():  # two-valued weights with a little noise: nothing like a bell curve
        model[0].weight.copy_(torch.sign(torch.randn(256, 256)) + 0.02 * torch.randn(256, 256))
    data = [torch.randn(64, 256) for _ in range(4)]
    universal = lobcq_fx.quantize(model, data)
    fitted = lobcq_fx.quantize(model, data, LobcqConfig(codebooks="fitted"))
    # One set serves weights and activations; it still spends entries on the weights' two values.
    gain = fitted.inventory.records[0].weight_sqnr_db - universal.inventory.records[0].weight_sqnr_db
    assert gain > 6
    assert "fitted on only" in caplog.text  # 1024 arrays are few, and it says so
    assert {"lobcq.codebooks"} == {name for name in fitted.state_dict() if name.startswith("lobcq.")}


def test_codebooks_fitted_apart_are_those_that_quantize_fits(tmp_path):
    fit = fit_shared_codebooks(mlp(), batches(), FormatSpec(4, 32))
    q = lobcq_fx.quantize(mlp(), batches(), LobcqConfig(codebooks="fitted", format="4x32"))
    assert torch.equal(q.state_dict()["lobcq.codebooks"], fit.codebooks)
    assert fit.fit.mse_history[-1] < fit.fit.mse_history[0]


def test_fitted_codebooks_that_lose_on_arrays_held_out_are_not_taken(caplog):
    """A handful of arrays: a fit learns them by heart, and does worse on others than the universal set."""
    torch.manual_seed(3)
    model, data = nn.Linear(64, 24), [torch.randn(24, 64)]
    fit = fit_shared_codebooks(model, data, FormatSpec(16, 64))
    assert not fit.is_better
    assert fit.fitted_db < fit.universal_db
    assert torch.equal(fit.codebooks, universal_codebooks(16))
    q = lobcq_fx.quantize(model, data, LobcqConfig(codebooks="fitted", format="16x64"))
    assert torch.equal(q.state_dict()["lobcq.codebooks"], universal_codebooks(16))
    assert "the universal ones are taken" in caplog.text


def test_codebooks_of_a_file(tmp_path):
    path = tmp_path / "codebooks.json"
    linear = [[round((j - 7.5) * 31 / 7.5) for j in range(16)]] * 8
    path.write_text(json.dumps({"codebooks": {"8": linear}}))
    q = lobcq_fx.quantize(mlp(), config=LobcqConfig(codebooks=str(path)), example_inputs=batches()[0])
    assert q.state_dict()["lobcq.codebooks"].tolist() == linear

    config = LobcqConfig(codebooks=str(path), format="16x64")
    with pytest.raises(ConfigError, match="has no set '16'"):
        lobcq_fx.quantize(mlp(), config=config, example_inputs=batches()[0])
    path.write_text("[]")
    with pytest.raises(ConfigError, match="does not hold codebooks"):
        lobcq_fx.quantize(mlp(), config=LobcqConfig(codebooks=str(path)), example_inputs=batches()[0])


def test_tokenizer_outputs_calibrate_a_language_model():
    batch = transformers.BatchEncoding(token_batches()[0])
    q = lobcq_fx.quantize(causal_lm("llama"), [batch], static_cache=False)
    assert all(record.activation_sqnr_db is not None for record in q.inventory.quantized)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_float_model_survives_unless_asked_otherwise(inplace):
    model = mlp()
    x = batches()[0]
    before = model(x)
    q = lobcq_fx.quantize(model, example_inputs=x, inplace=inplace)
    q(x)
    if inplace:
        assert model.up.weight.numel() == 0
    else:
        assert torch.equal(model(x), before)
        assert all(p.requires_grad for p in model.parameters())


@pytest.fixture
def objects_of_this_test_alone():
    """For the garbage collector: in a process that has run many tests there are millions."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("objects_of_this_test_alone")
def test_a_language_model_s_float_weights_are_freed_one_by_one():
    size = 180  # of no other model's weights in this process
    model = causal_lm("llama", intermediate_size=size)
    left = []

    def count(step, done, total):
        if step == "encode":
            gc.collect()
            tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
            storages = {t.untyped_storage().data_ptr() for t in tensors if size in t.shape and t.dtype == torch.float32}
            left.append(len(storages - {0}))

    q = lobcq_fx.quantize(model, inplace=True, progress=count)
    assert left[-1] == 0
    assert left[:7] == [6, 6, 6, 6, 5, 4, 3]  # of six in two layers: q, k, v and o, then gate, up and down go
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(q(ids, past_key_values=q.static_cache(9)).logits, q(ids).logits)


def test_progress_is_reported_for_every_step():
    calls = []
    config = LobcqConfig(codebooks="fitted")
    lobcq_fx.quantize(mlp(), batches(), config, progress=lambda *call: calls.append(call))
    traced = [(done, total) for step, done, total in calls if step == "trace"]
    assert [done for done, _ in traced[:-1]] == list(range(len(traced) - 1))  # every call of a submodule is a step
    assert traced[-1] == (len(traced) - 2, len(traced) - 2)
    assert len(traced) > 4
    assert ("calibrate", 4, 4) in calls
    assert ("encode", 2, 2) in calls
    assert "fit codebooks" in {step for step, _, _ in calls}


def test_data_are_asked_for_only_where_the_settings_need_them():
    with pytest.raises(CalibrationError, match="need calibration_data"):
        lobcq_fx.quantize(mlp(), config=LobcqConfig(codebooks="fitted"), example_inputs=batches()[0])
    with pytest.raises(CalibrationError, match="calibration_data is empty"):
        lobcq_fx.quantize(mlp(), [])
    with pytest.raises(TraceError, match="needs example_inputs"):
        lobcq_fx.quantize(mlp())


def test_a_layer_that_saw_only_empty_batches_is_named():
    with pytest.raises(CalibrationError, match="no activation of up was observed"):
        lobcq_fx.quantize(
            mlp(), [torch.empty(0, 64)], LobcqConfig(activation_scale="static"), example_inputs=batches()[0]
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_is_named_with_its_index(bad):
    model = mlp()
    with torch.no_grad():
        model.down.weight[3, 17] = bad
    with pytest.raises(LobcqError, match=r"cannot encode down.weight: x\[3, 17\] is (nan|inf)"):
        lobcq_fx.quantize(model, example_inputs=batches()[0])


def test_nothing_to_quantize_is_an_error_that_says_why():
    with pytest.raises(ConfigError, match="down: excluded by pattern '\\*'"):
        lobcq_fx.quantize(mlp(), config=LobcqConfig(exclude=["*"]), example_inputs=batches()[0])


def test_bad_calibration_activations_are_named():
    with pytest.raises(CalibrationError, match="activation of up holds nan"):
        lobcq_fx.quantize(mlp(), [torch.full((2, 64), float("nan"))])


@torch.no_grad()
def test_half_precision_models_stay_in_their_dtype():
    model = causal_lm("llama").bfloat16()
    q = lobcq_fx.quantize(model)
    ids = token_batches()[0]["input_ids"]
    logits = q(ids).logits
    assert logits.dtype == torch.bfloat16
    with fake_quantized(model, quantized_layers(q)):
        expected = model(ids).logits
    assert (logits - expected).float().norm() < 0.05 * expected.float().norm()
    assert q.dtype == torch.bfloat16


@torch.no_grad()
def test_generation_by_sampling_beams_and_pipelines():
    model = causal_lm("llama")
    q = lobcq_fx.quantize(model)
    ids = token_batches()[0]["input_ids"]
    settings = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    with fake_quantized(model, quantized_layers(q), exact=True):
        for extra in ({"do_sample": True, "top_p": 0.9}, {"num_beams": 3, "do_sample": False}):
            torch.manual_seed(3)
            expected = model.generate(ids, **settings, **extra)
            torch.manual_seed(3)
            assert torch.equal(q.generate(ids, **settings, **extra), expected)


def test_a_recipe_in_the_place_of_settings():
    x = batches()
    q = lobcq_fx.quantize(mlp(), x, recipe="balanced")
    assert (q.lobcq_config.smoothing, q.lobcq_config.rounding) == ("folded", "compensated")
    with pytest.raises(ConfigError, match="pass config or recipe, not both"):
        lobcq_fx.quantize(mlp(), x, LobcqConfig(), recipe="balanced")
