"""Each language model's folder opens by `from_pretrained` too, with the graph's logits; or it is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lobcq_fx
from lobcq_fx.errors import CheckpointError
from tests.integrations.models import opened, saved
from tests.more_families import FAMILIES, LanguageModel
from tests.sweeps import sweep

SCANS = "which no module does"
REFUSED = {
    **dict.fromkeys(("mamba", "falcon_mamba", "mamba2", "bamba", "falcon_h1", "granitemoehybrid", "jamba"), SCANS),
    **dict.fromkeys(("nemotron_h", "zamba2", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), SCANS),
    "llama4_text": "Llama4TextExperts runs its experts in a way of its own",
    "falcon": "FalconLinear is no plain linear",
}
LANGUAGE_MODELS = [name for name, family in FAMILIES.items() if isinstance(family, LanguageModel)]
WHOLE_ROWS = {"moe_intermediate_size": 96, "intermediate_size": 96}
"""Rows of 16 bytes in bf16 too, as torch's grouped products need them."""


@torch.no_grad()
@pytest.mark.parametrize("name", sweep(LANGUAGE_MODELS, ["deepseek_v3"]))
def test_both_doors_give_the_same_logits(tmp_path, name):
    family = FAMILIES[name]
    model = family.model()
    folder = saved(model, tmp_path / "q")
    if name in REFUSED:
        with pytest.raises(CheckpointError, match=rf"{REFUSED[name]}.*lobcq_fx\.load\(folder\)"):
            opened(folder)
        return
    call = family.call(model)
    torch.testing.assert_close(
        family.results(opened(folder), call), family.results(lobcq_fx.load(folder), call), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("name", sweep(["deepseek_v3", "deepseek_v2", "glm4_moe", "ernie4_5_moe"], ["deepseek_v3"]))
def test_a_router_that_is_cast_is_one_tensor_by_its_own_name_for_both(tmp_path, name):
    """In both graphs; the class casts it back, and forth."""
    family = replace(FAMILIES[name], changes={**FAMILIES[name].changes, **WHOLE_ROWS})
    model = family.model().to(torch.bfloat16)
    q = lobcq_fx.quantize(model)
    gates = {key: value.dtype for key, value in q.state_dict().items() if "gate.weight" in key}
    assert gates == {"model.layers.0.mlp.gate.weight": torch.float32}
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    q.save_pretrained(tmp_path / "q")
    call = family.call(model)
    module_model = opened(tmp_path / "q")
    kept = "gate.weight" in (model._keep_in_fp32_modules_strict or ())  # as its class reads it, quantized or not
    assert module_model.lm_head.weight.dtype == torch.bfloat16
    assert module_model.model.layers[0].mlp.gate.weight.dtype == (torch.float32 if kept else torch.bfloat16)
    assert torch.equal(family.results(module_model, call), family.results(q, call))
