"""`from_pretrained` of mixtures: experts on packed stacks, in transformers' own modules, with the graph's numbers."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import transformers

import lobcq_fx
from lobcq_fx import LobcqConfig, LobcqQuantizationConfig
from lobcq_fx.errors import CheckpointError, ConfigError, LobcqError
from lobcq_fx.format import rotate
from lobcq_fx.modules.lobcq_grouped_linear import LobcqGroupedLinear
from tests.frontends.test_experts import float_model
from tests.integrations.models import GREEDY, IDS, opened, results, saved
from tests.sweeps import crossed

MODES = ("w4a4", "w4a8", "w4a16")
STATIC = LobcqConfig(activation_scale="static")


def stacks(model):
    return {name for name, module in model.named_modules() if isinstance(module, LobcqGroupedLinear)}


def as_read(folder, config=None, **settings):
    return opened(folder, quantization_config=LobcqQuantizationConfig(config), **settings)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    float_model("mixtral").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "mode"), crossed(["mixtral", "gpt_oss"], MODES))
def test_both_doors_give_the_graphs_logits_and_tokens(tmp_path, family, mode):
    """gpt-oss has its stacks transposed, gate and up interleaved, biases, and a gate of its own."""
    config, model = LobcqConfig(mode=mode), float_model(family)
    model.save_pretrained(tmp_path / "float")
    folder = saved(model, tmp_path / "q", config)
    q = lobcq_fx.load(folder)
    layers = {record.layer for record in q.inventory.quantized if ".experts." in record.layer}
    for module_model in (opened(folder), as_read(tmp_path / "float", config)):
        assert type(module_model) is type(model)
        assert stacks(module_model) == layers
        assert torch.equal(results(module_model), results(q))
        assert torch.equal(module_model.generate(IDS, **GREEDY), q.generate(IDS, **GREEDY))


def test_static_scales(tmp_path):
    data = [{"input_ids": torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(0))}]
    folder = saved(float_model("mixtral"), tmp_path / "q", STATIC, data)
    model, q = opened(folder), lobcq_fx.load(folder)
    assert all(module.settings.static_scale for module in model.modules() if isinstance(module, LobcqGroupedLinear))
    assert torch.equal(results(model), results(q))


@pytest.mark.parametrize("mode", ["w4a4", "w4a16"])
def test_treated_experts_give_the_graphs_logits(tmp_path, mode, monkeypatch):
    """Tokens are rotated before the first stack, and multiplied before the second, which nothing can be folded into."""
    monkeypatch.setattr("lobcq_fx.rotation.LEAST_GAIN", -math.inf)
    data = [{"input_ids": torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(0))}]
    folder = saved(float_model("gpt_oss"), tmp_path / "q", LobcqConfig.of_recipe("best", mode=mode), data)
    model, q = opened(folder), lobcq_fx.load(folder)
    experts = model.model.layers[0].mlp.experts
    up, down = experts.gate_up_proj, experts.down_proj
    assert (up.settings.rotated, up.settings.input_scale) == (True, False)
    assert (down.settings.rotated, down.settings.input_scale) == (False, True)  # K is no multiple of an array
    assert down.input_scale.unique().numel() > 1
    assert torch.equal(results(model), results(q))
    x, ends = torch.randn(9, 64), torch.tensor([2, 2, 5, 9], dtype=torch.int32)
    prepacked = up(x, ends)
    up.unpack()
    torch.testing.assert_close(up(x, ends), prepacked, rtol=1e-4, atol=1e-4)
    for module, columns in ((up, 64), (down, 172)):
        x = torch.randn(9, columns, requires_grad=True)
        (gradient,) = torch.autograd.grad(module(x, ends).square().sum() / 2, x)
        read = x if module.input_scale is None else x * module.input_scale
        read = rotate(read, 64) if module.settings.rotated else read
        weights = [w[:, :columns] for w in module.matrices(module.codebooks)]
        parts = zip(read.split([2, 0, 3, 4]), weights, strict=True)
        (straight,) = torch.autograd.grad(torch.cat([a @ w.T for a, w in parts]), x, module(x, ends).detach())
        torch.testing.assert_close(gradient, straight, rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_opened_again(mixtral, tmp_path):
    config = LobcqConfig(format="2x128", overrides={"*.down_proj": {"mode": "w4a8"}})
    model = as_read(mixtral, config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = opened(tmp_path)
    assert stacks(again) == stacks(model)
    assert torch.equal(results(again), results(model))
    down = again.model.layers[0].mlp.experts.down_proj
    assert (down.settings.mode, down.settings.spec.name, down.num_experts) == ("w4a8", "2x128", 4)
    assert repr(down).startswith("LobcqGroupedLinear(num_experts=4, in_features=")


def test_a_cast_leaves_the_bytes_alone(mixtral):
    model = as_read(mixtral)
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    model.to(torch.bfloat16)
    after = stack.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


def test_excluded_experts_stay_transformers_own(mixtral):
    model = as_read(mixtral, LobcqConfig(exclude=(*LobcqConfig().exclude, "*.experts.*")))
    q = lobcq_fx.quantize(float_model("mixtral"), config=LobcqConfig(exclude=(*LobcqConfig().exclude, "*.experts.*")))
    assert not stacks(model)
    torch.testing.assert_close(results(model), results(q))


def test_one_stack_without_the_other_is_refused(mixtral):
    config = LobcqConfig(exclude=(*LobcqConfig().exclude, "*.down_proj"))
    with pytest.raises(ConfigError, match=r"gate_up_proj would be packed without .*down_proj.*Remedy"):
        as_read(mixtral, config)


def test_experts_of_another_kind_are_refused_or_left_with_a_warning(tmp_path, caplog):
    """Llama 4 runs its experts itself."""
    folder = saved(float_model("llama4"), tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"Llama4TextExperts runs its experts in a way of its own.*Remedy"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    float_model("llama4").save_pretrained(tmp_path / "float")
    with caplog.at_level(logging.WARNING, logger="lobcq_fx"):
        model = as_read(tmp_path / "float")
    assert not stacks(model)
    assert "experts.gate_up_proj stays in float: Llama4TextExperts" in caplog.text


def test_another_implementation_says_what_to_do(mixtral):
    model = as_read(mixtral)
    model.set_experts_implementation("eager")
    with pytest.raises(LobcqError, match="set_experts_implementation"):
        results(model)
    model.set_experts_implementation("lobcq")
    assert torch.isfinite(results(model)).all()


def test_a_damaged_stack_is_refused(mixtral, tmp_path):
    model = as_read(mixtral)
    model.model.layers[0].mlp.experts.down_proj.tensor_scale[1] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj\.tensor_scale is nan"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_it_compiles_in_one_graph(mixtral):
    model = as_read(mixtral)
    expected = model(input_ids=IDS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=IDS).logits, expected)
