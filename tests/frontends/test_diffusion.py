"""Models of diffusers: quantized, compared with fake-quantized ones, saved, compiled, and put into pipelines."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

import lobcq_fx
from lobcq_fx.errors import TraceError
from tests.families import fake_quantized, quantized_layers

diffusers = pytest.importorskip("diffusers")

WIDTH = {"num_attention_heads": 4, "attention_head_dim": 16}
TEXT = {"joint_attention_dim": 64, "pooled_projection_dim": 64}


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dit():
    return diffusers.DiTTransformer2DModel(
        **WIDTH, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=1000
    )


def dit_call(batch):
    return {
        "hidden_states": noise(batch, 4, 8, 8),
        "timestep": torch.arange(batch) + 3,
        "class_labels": torch.arange(batch),
    }


def sd3():
    return diffusers.SD3Transformer2DModel(
        **WIDTH, **TEXT, caption_projection_dim=64, in_channels=4, out_channels=4, num_layers=1, sample_size=8
    )


def sd3_call(batch):
    text = {"encoder_hidden_states": noise(batch, 5, 64), "pooled_projections": noise(batch, 64)}
    return {"hidden_states": noise(batch, 4, 8, 8), "timestep": torch.arange(batch) + 3.0, **text}


def flux():
    return diffusers.FluxTransformer2DModel(
        **WIDTH, **TEXT, in_channels=16, num_layers=1, num_single_layers=1, axes_dims_rope=(4, 4, 8)
    )


def flux_call(batch):
    text = {"encoder_hidden_states": noise(batch, 5, 64), "pooled_projections": noise(batch, 64)}
    places = {"img_ids": noise(16, 3).abs(), "txt_ids": torch.zeros(5, 3)}
    return {"hidden_states": noise(batch, 16, 16), "timestep": torch.arange(batch) / 10, **text, **places}


KINDS = {"dit": (dit, dit_call), "sd3": (sd3, sd3_call), "flux": (flux, flux_call)}


def made(kind):
    """With weights that make results differ; some are zeros at first."""
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + (parameter.dim() == 1) * parameter)
    return model


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request):
    model, call = made(request.param), KINDS[request.param][1]
    return model, lobcq_fx.quantize(model, example_inputs=call(2)), call


@torch.no_grad()
def test_nearly_all_is_quantized_and_computes_what_the_fake_quantized_model_does(pair):
    model, q, call = pair
    assert q.inventory.mac_coverage >= 0.97
    with fake_quantized(model, quantized_layers(q)):
        expected = model(**call(3))
    actual = q(**call(3))
    assert type(actual) is type(expected)
    difference = (actual.sample - expected.sample).norm() / expected.sample.norm()
    effect = (model(**call(3)).sample - expected.sample).norm() / expected.sample.norm()
    assert difference < 0.1 * effect


@torch.no_grad()
def test_a_call_may_ask_for_a_tuple_and_pass_what_says_nothing(pair):
    _, q, call = pair
    (actual,) = q(**call(2), return_dict=False)
    assert torch.equal(actual, q(**call(2), return_dict=True).sample)
    if "encoder_hidden_states" in call(2):
        assert torch.equal(actual, q(**call(2), joint_attention_kwargs={}).sample)


@torch.no_grad()
def test_saved_and_loaded_models_are_the_same_and_have_a_configuration(pair, tmp_path):
    model, q, call = pair
    q.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    assert torch.equal(loaded(**call(2)).sample, q(**call(2)).sample)
    assert type(loaded) is type(q)
    assert loaded.config == q.config
    assert loaded.config.in_channels == model.config.in_channels
    loaded.save_pretrained(tmp_path / "again")
    assert lobcq_fx.load(tmp_path / "again").config == q.config


@torch.no_grad()
@pytest.mark.parametrize("pair", ["dit"], indirect=True)
def test_it_compiles_as_one_graph(pair):
    _, q, call = pair
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**call(2)).sample, q(**call(2)).sample, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pair", ["dit"], indirect=True)
def test_it_exports_to_onnx_with_its_configuration(pair, tmp_path):
    """The export compares every output in ONNX Runtime with the torch model."""
    _, q, call = pair
    lobcq_fx.export_onnx(q, tmp_path / "exported", call(2))
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == q.config.to_dict()


def test_an_example_is_needed():
    with pytest.raises(TraceError, match="needs example_inputs: pass the arguments of one step"):
        lobcq_fx.quantize(dit())


def run(pipeline, **call):
    """What a pipeline gives, and what it calls its transformer with."""
    calls = []

    def keep(module, args, kwargs):
        calls.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    hook = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    hook.remove()
    return result.images, calls


def autoencoder():
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**blocks, block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def test_a_pipeline_of_classes(tmp_path):
    pipeline = diffusers.DiTPipeline(made("dit"), autoencoder(), diffusers.DDIMScheduler())
    call = {"class_labels": [1, 2], "output_type": "np"}
    before, calls = run(pipeline, **call)
    pipeline.transformer = lobcq_fx.quantize(pipeline.transformer, example_inputs=calls[0])
    after, _ = run(pipeline, **call)
    assert after.shape == before.shape
    assert 0 < abs(after - before).mean() < 0.1
    pipeline.transformer.save_pretrained(tmp_path / "q")
    pipeline.transformer = lobcq_fx.load(tmp_path / "q")
    assert (run(pipeline, **call)[0] == after).all()


def test_a_pipeline_of_texts_with_calls_as_calibration_data():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    pipeline = diffusers.FluxPipeline(scheduler, autoencoder(), transformer=made("flux"), **parts)
    prompt = {"prompt_embeds": noise(1, 5, 64), "pooled_prompt_embeds": noise(1, 64)}
    call = {**prompt, "height": 8, "width": 8, "output_type": "latent"}
    before, calls = run(pipeline, **call)
    config = lobcq_fx.LobcqConfig(activation_scale="static")
    pipeline.transformer = lobcq_fx.quantize(pipeline.transformer, calls, config)
    after, _ = run(pipeline, **call)
    assert 0 < (after - before).norm() < 0.5 * before.norm()
