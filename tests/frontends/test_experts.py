"""Mixtures of experts, whose routed experts run in LO-BCQ: grouped products of tokens sorted by expert."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import lobcq_fx
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.format import universal_codebooks
from lobcq_fx.ops.dequantize_weight import decoded_weight
from tests.families import ONE_LAYER, fake_quantized, quantized_layers
from tests.frontends.test_causal_lm_families import assert_logits_close, batch

pytestmark = pytest.mark.usefixtures("traced_once")

SMALL = {**ONE_LAYER, "hidden_size": 64, "head_dim": 16, "num_experts_per_tok": 2}
FAMILIES = {
    # Stacks [E, N, K], rows by offsets.
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    # Stacks [E, K, N], gate and up interleaved, biases for each row.
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, num_local_experts=4),
    # Groups of one size, [E, M, K] by [E, K, N]; a shared expert.
    "llama4": lambda: transformers.Llama4TextConfig(
        **SMALL, num_local_experts=4, intermediate_size_mlp=100, interleave_moe_layer_step=1, attention_chunk_size=32
    ),
    # Shared experts, and a router of groups.
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, n_routed_experts=4, moe_intermediate_size=100, first_k_dense_replace=0,
        n_group=1, topk_group=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16,
    ),
}  # fmt: skip


def float_model(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Experts differ by more than chance, in magnitude too: each has a tensor scale of its own.
            parameter.mul_(4 if parameter.dim() > 1 else 1)
            if parameter.dim() == 3:
                parameter.mul_(torch.tensor([1.0, 0.5, 0.1, 0.8]).view(4, 1, 1))
    return model


@cache
def quantized(family):
    model = float_model(family)
    return model, lobcq_fx.quantize(model, static_cache=False)


@pytest.fixture(params=list(FAMILIES))
def pair(request, traced_once):
    return quantized(request.param)


@torch.no_grad()
def logits_by_steps(q, ids, mask, positions):
    pieces, cache = [], None
    for start, stop in ((0, 6), (6, 9), (9, 10), (10, 11)):
        part = {"input_ids": ids[:, start:stop]} | {name: one[:, start:stop] for name, one in positions.items()}
        out = q(**part, attention_mask=mask[:, :stop], past_key_values=cache)
        cache = out.past_key_values
        pieces.append(out.logits)
    return torch.cat(pieces, dim=1)


def positions_of(q, mask):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"position_ids": positions} if "position_ids" in q.calling.inputs else {}


def test_all_that_no_pattern_excludes_is_quantized(pair):
    _, q = pair
    experts = [record for record in q.inventory if "experts." in record.layer and len(record.shape) == 3]
    assert [record.layer.rpartition(".")[2] for record in experts] == ["gate_up_proj", "down_proj"]
    assert all(record.quantized and record.shape[0] == 4 for record in experts)
    assert all(record.packed_bytes < record.float_bytes / 5 and record.weight_sqnr_db > 20 for record in experts)
    assert q.inventory.asked_coverage == 1
    assert [record.layer for record in q.inventory.left_alone if record.excluded] != []


@torch.no_grad()
def test_logits_and_tokens_are_those_of_fake_quantized_experts(pair):
    model, q = pair
    ids, mask = batch(3)
    positions = positions_of(q, mask)
    with fake_quantized(model, quantized_layers(q)):
        expected = model(ids, attention_mask=mask, **positions).logits
    float_logits = model(ids, attention_mask=mask, **positions).logits
    assert (float_logits - expected)[mask.bool()].abs().max() > 1e-3 * expected.std()
    assert_logits_close(logits_by_steps(q, ids, mask, positions), expected, mask)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings |= {"eos_token_id": None}
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = model.generate(ids, **settings)
    assert torch.equal(q.generate(ids, **settings), expected)


@torch.no_grad()
def test_it_is_saved_and_loaded(pair, tmp_path):
    _, q = pair
    ids, mask = batch(3)
    q.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    assert torch.equal(loaded(ids, attention_mask=mask).logits, q(ids, attention_mask=mask).logits)
    before, after = q.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    stacked = [name for name in before if name.endswith("_proj.tensor_scale") and before[name].dim() == 1]
    assert len(stacked) == 2
    assert all(before[name].shape == (4,) for name in stacked)


@pytest.mark.parametrize("mode", ["w4a8", "w4a16"])
@torch.no_grad()
def test_other_modes(mode):
    model = float_model("mixtral")
    q = lobcq_fx.quantize(model, config=lobcq_fx.LobcqConfig(mode=mode), static_cache=False)
    assert q.inventory.asked_coverage == 1
    ids, mask = batch(3)
    with fake_quantized(model, quantized_layers(q), mode=mode):
        expected = model(ids, attention_mask=mask).logits
    assert_logits_close(q(ids, attention_mask=mask).logits, expected, mask)


@torch.no_grad()
def test_bf16_goes_through_torch_s_own_grouped_product(tmp_path):
    """Whose operator no folder may call, since it trusts offsets: ours, which does not, is saved."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL | {"intermediate_size": 176}, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config).eval().bfloat16()
    q = lobcq_fx.quantize(model, static_cache=False)
    assert {record.operation for record in q.inventory if ".experts." in record.layer} == {"_grouped_mm"}
    ids, mask = batch(3)
    with fake_quantized(model, quantized_layers(q)):
        expected = model(ids, attention_mask=mask).logits.float()
    actual = q(ids, attention_mask=mask).logits
    assert actual.dtype == torch.bfloat16
    assert_logits_close(actual.float(), expected, mask)
    q.save_pretrained(tmp_path / "q")
    assert torch.equal(lobcq_fx.load(tmp_path / "q")(ids, attention_mask=mask).logits, actual)


@torch.no_grad()
def test_recipes_and_settings_of_one_projection(caplog):
    """The treatment of linears, whatever the formats."""
    model, data = float_model("mixtral"), [batch(2, seed)[0] for seed in range(2)]
    config = lobcq_fx.LobcqConfig.of_recipe(
        "best", overrides={"*.experts.down_proj": {"format": "16x32", "mode": "w4a8"}}
    )
    with caplog.at_level(logging.WARNING):
        q = lobcq_fx.quantize(model, data, config, static_cache=False)
    records = {record.layer: record for record in q.inventory.quantized}
    up, down = (records[f"model.layers.0.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    assert (up.format, up.mode, down.format, down.mode) == ("8x64", "w4a4", "16x32", "w4a8")
    for record in (up, down):
        assert record.smoothing == "folded"
        assert record.activation_sqnr_db is not None
    ids, mask = batch(3)
    ours, floats = q(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    assert (ours - floats)[mask.bool()].norm() < 0.5 * floats[mask.bool()].norm()


@torch.no_grad()
def test_experts_that_calibration_never_reached_are_reported(caplog):
    """Two tokens reach four of eight experts at most; what these got stands for the others."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_local_experts=8)
    model = transformers.MixtralForCausalLM(config).eval()
    data, config = [torch.tensor([[5, 9]])], lobcq_fx.LobcqConfig(activation_scale="static")
    taken = torch.cat(router_choices(model, data[0])).bincount(minlength=8)
    q = lobcq_fx.quantize(model, data, config, static_cache=False)
    records = [record for record in q.inventory if record.shape is not None and len(record.shape) == 3]
    assert [record.unreached for record in records] == [int((taken == 0).sum())] * 2
    assert all(record.unreached is None for record in q.inventory if record not in records)
    assert 4 <= records[0].unreached < 8
    text = f"{records[0].unreached} of 8 experts of model.layers.0.mlp.experts.gate_up_proj got no token"
    assert text in caplog.text
    ids, mask = batch(3, seed=5)
    assert q(ids, attention_mask=mask).logits.isfinite().all()


def router_choices(model, ids):
    """Which experts each token gets, [tokens * 2] for each layer."""
    found = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: found.append(args[1].flatten()))
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def test_it_compiles_whole_and_takes_static_caches():
    model = float_model("mixtral")
    q = lobcq_fx.quantize(model)
    ids, mask = batch(3)
    eager = q(ids, attention_mask=mask).logits
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, attention_mask=mask).logits, eager)
    torch.testing.assert_close(compiled(ids[:, :7], attention_mask=mask[:, :7]).logits[1:], eager[1:, :7])
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings |= {"eos_token_id": None}
    static = q.generate(ids, cache_implementation="static", **settings)
    assert torch.equal(static, q.generate(ids, **settings))


@torch.no_grad()
def test_a_budget_is_spent_on_experts_too():
    model, data = float_model("mixtral"), [batch(2, seed)[0] for seed in range(2)]
    config = lobcq_fx.LobcqConfig.auto(bits=4.3, activation_bits=5.0, rounding="nearest")
    q = lobcq_fx.quantize(model, data, config, static_cache=False)
    records = [(record, lobcq_fx.FormatSpec.from_name(record.format)) for record in q.inventory.quantized]
    spent = sum(spec.bits_per_scalar * record.scalars for record, spec in records)
    assert spent <= 4.3 * sum(record.scalars for record, _ in records)
    # They are most of the model: as the settings have them, at 4.5 bits, nothing would fit.
    assert any(spec.bits_per_scalar < 4.5 for record, spec in records if ".experts." in record.layer)
    error = (q(data[0]).logits - model(data[0]).logits).norm() / model(data[0]).logits.norm()
    assert error < 0.5


def test_experts_that_are_excluded_stay_in_float_and_are_counted():
    model = float_model("mixtral")
    config = lobcq_fx.LobcqConfig(exclude=(*lobcq_fx.LobcqConfig().exclude, "*.experts.*"))
    q = lobcq_fx.quantize(model, config=config, static_cache=False)
    left = [record for record in q.inventory.left_alone if ".experts." in record.layer]
    assert [record.reason for record in left] == ["excluded by pattern '*.experts.*'"] * 2
    assert [record.shape for record in left] == [(4, 344, 64), (4, 64, 172)]
    tokens = left[0].multiply_adds // (344 * 64)
    assert left[1].multiply_adds == tokens * 172 * 64  # two experts of the four for each token
    assert q.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, pad_token_id=0).shape == (1, 5)


def test_experts_one_by_one_whose_tokens_follow_from_values():
    """JetMoe runs a linear for each expert, on as many tokens as the router sends: a size that no example fixes."""
    torch.manual_seed(0)
    config = transformers.JetMoeConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16, intermediate_size=64,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.JetMoeForCausalLM(config).eval()
    q = lobcq_fx.quantize(model, config=lobcq_fx.LobcqConfig(mode="w4a16"), static_cache=False)
    experts = [record for record in q.inventory.quantized if record.layer.count("weight_part")]
    assert len(experts) == 4 * 4
    assert {record.multiply_adds for record in experts} == {None}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "router" not in name and "embed" not in name and "lm_head" not in name and weight.dim() > 1:
                for one in weight if weight.dim() == 3 else [weight]:
                    spec, books = lobcq_fx.FormatSpec(8, 64), universal_codebooks(8)
                    one.copy_(decoded_weight(encode_weight(one, spec, books, name)))
        ids = torch.randint(3, 96, (2, 11))
        torch.testing.assert_close(q(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
