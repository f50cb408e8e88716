"""What lowers the error of linears lowers that of experts: by what each of them meets, exactly in float."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.float_weights import FloatWeights
from lobcq_fx.frontends import front_end_of
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.inventory import MatmulRecord
from lobcq_fx.passes.insert_observers import InsertObservers, observed
from lobcq_fx.pipeline import make_plan
from lobcq_fx.smoothing import smooth, smoothing_groups
from lobcq_fx.tracing.trace import MAIN
from tests.frontends.test_causal_lm_families import batch
from tests.frontends.test_experts import SMALL, float_model

TEXT = Path(__file__).parents[2] / "README.md"
LENGTH = 64


def of_bytes() -> transformers.PreTrainedModel:
    """A mixture that reads bytes; what it makes of them has columns that stand out, and few directions."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "intermediate_size": 128}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL | sizes, num_local_experts=4)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.randn(256, 10) @ torch.randn(10, 64) + 0.2 * torch.randn(256, 64))
        model.model.layers[0].post_attention_layernorm.weight[3::11] *= 20
        experts = model.model.layers[0].mlp.experts
        experts.gate_up_proj.mul_(4)
        experts.gate_up_proj[:, 128 + 5 :: 17] *= 10
        experts.down_proj.mul_(4)
    return model


def read(first: int, count: int) -> Tensor:
    """Parts of a text, one after the other."""
    ids = torch.tensor(list(TEXT.read_bytes()), dtype=torch.int64)
    return ids[first * LENGTH :][: count * LENGTH].view(count, LENGTH)


@cache
@torch.no_grad()
def error(**settings: str) -> tuple[float, list[MatmulRecord]]:
    """Of the results on a part of the text that was not calibrated with, where experts alone are quantized."""
    model, held_out = of_bytes(), read(40, 8)
    config = LobcqConfig(exclude=(*LobcqConfig().exclude, "*self_attn*"), **settings)
    q = lobcq_fx.quantize(model, read(0, 40).split(10), config, static_cache=False)
    records = list(q.inventory.quantized)
    assert [record.layer.rpartition(".")[2] for record in records] == ["gate_up_proj", "down_proj"]
    return float((q(held_out).logits - model(held_out).logits).square().mean()), records


TREATMENTS: list[dict[str, str]] = [
    {"mode": "w4a16"},
    {"mode": "w4a8", "smoothing": "folded"},
    {"mode": "w4a4", "smoothing": "everywhere", "rotation": "hadamard"},
]


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("treatment", TREATMENTS, ids=str)
def test_compensation_lowers_the_error_on_what_was_not_seen(treatment: dict[str, str]) -> None:
    nearest, _ = error(**treatment)
    compensated, _ = error(**treatment, rounding="compensated")
    assert compensated < 0.9 * nearest


@pytest.mark.usefixtures("traced_once")
def test_smoothing_and_rotation_lower_it_each() -> None:
    plain, _ = error(mode="w4a4")
    smoothed, of_smoothed = error(mode="w4a4", smoothing="folded")
    rotated, of_rotated = error(mode="w4a4", rotation="hadamard")
    assert [record.smoothing for record in of_smoothed] == ["folded", "folded"]
    assert any(record.rotated for record in of_rotated)
    assert [record.undersampled for record in of_smoothed + of_rotated] == [0, 0, None, None]
    assert smoothed < 0.9 * plain
    assert rotated < 0.9 * plain


FOLDED = {
    "mixtral": {"gate_up_proj": (64,), "down_proj": (4, 172)},
    "deepseek_v3": {"gate_up_proj": (64,), "down_proj": (4, 100)},
    "gpt_oss": {"gate_up_proj": (64,)},
    "llama4": {"gate_up_proj": (64,), "down_proj": (4, 172)},
}
"""Scales of experts by family; the gate of gpt-oss lets none through."""


@pytest.mark.parametrize("family", FOLDED)
@torch.no_grad()
def test_smoothed_experts_are_the_same_in_float_to_the_last_bit(family: str) -> None:
    """With the router, which stays in float, and with shared experts that read the same norm."""
    model = float_model(family)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight[::7] *= 16
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    traced = front_end_of(model).trace(model, None, static_cache=False)
    plan, _ = make_plan(traced.graph_modules, LobcqConfig(smoothing="folded"))
    main = traced.graphs[MAIN].graph_module
    groups = smoothing_groups(plan, traced.graph_modules)
    InsertObservers(plan)(main)
    ids, mask = batch(3)
    inputs = traced.graphs[MAIN].calling.flatten((), {"input_ids": ids, "attention_mask": mask})
    expected = main(*inputs)[0]
    result = smooth(plan, main, groups, observed(main, plan))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = {weight.source: scales.columns for weight, scales in result.scales.items() if weight.stacked}
    assert {name.rpartition(".")[2]: tuple(scale.shape) for name, scale in found.items() if scale is not None} == (
        FOLDED[family]
    )
    weights = FloatWeights(main, result.scales)
    for one in result.scales:
        scaled = torch.stack(list(weights.matrices(one))) if one.stacked else weights(one)
        scaled = scaled.mT if one.flipped else scaled
        assert not (one.stacked and torch.equal(get_attribute(main, one.source), scaled))
        get_attribute(main, one.source).copy_(scaled)
    assert torch.equal(main(*inputs)[0], expected)
