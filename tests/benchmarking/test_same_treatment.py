"""What the comparison of formats calls LO-BCQ under a recipe's treatment is what `quantize` makes with that recipe."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobcq_fx
from benchmarks.quality.same_treatment import TREATMENTS, Treated, chosen, evaluate, observe, treat
from benchmarks.quality.smollm2 import Remembered
from benchmarks.quality.treated_formats import FORMATS, int8_activation
from lobcq_fx import LobcqConfig
from lobcq_fx.evaluation import divergence_of_sequences
from lobcq_fx.format.rotation import rotate
from tests.families import causal_lm

ENCODERS = {"w4a8": int8_activation, "w4a4": FORMATS["LO-BCQ 8x64"].activation}


@pytest.mark.parametrize(("mode", "recipe"), [("w4a4", "fast"), ("w4a8", "balanced")])
def test_the_comparison_measures_what_users_get(mode, recipe):
    model = causal_lm("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    ids = torch.randint(3, 90, (10, 24), generator=torch.Generator().manual_seed(2))
    calibration, text = ids[:6], ids[6:]
    reference = Remembered(model)
    divergence_of_sequences(reference, model, list(text), max_length=24)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"}
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    seen = observe(model, layers, calibration)
    tried = treat(layers, seen, FORMATS["LO-BCQ 8x64"], TREATMENTS[recipe == "balanced"])
    treated = chosen(layers, seen, tried, ENCODERS[mode])
    found = evaluate(model, reference, layers, treated, ENCODERS[mode], text)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())

    config = LobcqConfig.of_recipe(recipe, mode=mode)
    data = [one[None] for one in calibration] if config.needs_calibration else None
    q = lobcq_fx.quantize(model, data, config, static_cache=False)
    expected = divergence_of_sequences(q, model, list(text), max_length=24)
    # Where rows of a weight take over a scale, array scales round otherwise than where its readers divide.
    close = 1e-3 if recipe == "fast" else 0.05
    assert found["fp32 perplexity"] == pytest.approx(expected.reference.perplexity, rel=1e-6)
    assert found["perplexity"] == pytest.approx(expected.model.perplexity, rel=close / 10)
    assert found["KL"] == pytest.approx(expected.kl_divergence, rel=close)
    assert found["KL"] > 0


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_the_layer_whose_input_has_columns_that_stand_out_is_rotated(treatment):
    model = causal_lm("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    model.model.layers[0].mlp.up_proj.weight.data[::64] *= 30
    ids = torch.randint(3, 90, (6, 24), generator=torch.Generator().manual_seed(3))
    layers = {"down": model.model.layers[0].mlp.down_proj}
    seen, operand = observe(model, layers, ids), FORMATS["LO-BCQ 8x64"]
    found = chosen(layers, seen, treat(layers, seen, operand, treatment), operand.activation)
    assert found["down"].rotated == (treatment == TREATMENTS[2])


def test_a_rotated_layer_is_the_layer():
    x, weight, scale = torch.randn(5, 128), torch.randn(8, 128), torch.full((128,), 4.0)
    one = Treated(rotate(weight * scale, 64, "weight"), scale, rotated=True)
    torch.testing.assert_close(one.inputs(x, None) @ one.weight.T, x @ weight.T, rtol=1e-4, atol=1e-4)
