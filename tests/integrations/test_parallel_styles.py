"""`from_pretrained(folder, tp_plan="auto")` on several ranks: each gives what one would, and holds a part of it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
import transformers

from lobcq_fx import LobcqConfig, LobcqQuantizationConfig
from lobcq_fx.format import universal_codebooks
from tests.integrations.models import batches, opened, saved
from tests.integrations.ranks import NOT_FINITE, activation, found

pytest.importorskip("transformers", minversion="5.23", reason="earlier releases let nobody divide packed weights")

SIZES = {
    "vocab_size": 98,  # no multiple of four
    "hidden_size": 256,
    "intermediate_size": 448,  # seven block arrays, not to be halved
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BIASED = {"attention_bias": True, "mlp_bias": True}  # where results are added, too
ARIA = {"intermediate_size": 512, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
TWO_FORMATS = LobcqConfig(
    smoothing="everywhere",
    exclude=("@head", "*.k_proj"),
    overrides={"*.o_proj": {"format": "2x128"}, "*.down_proj": {"activation_format": "16x16"}},
)
TRACED = {
    "llama": (transformers.LlamaConfig(**SIZES), LobcqConfig(exclude=())),
    "two kv heads, biases, rotated int8": (
        transformers.Qwen2Config(**SIZES | {"intermediate_size": 512, "num_key_value_heads": 2}),
        LobcqConfig(mode="w4a8", rotation="hadamard"),
    ),
    "smoothed, of two formats": (transformers.LlamaConfig(**SIZES, **BIASED, tie_word_embeddings=True), TWO_FORMATS),
    "transposed experts, static scales": (
        transformers.AriaTextConfig(**SIZES | ARIA),
        LobcqConfig(activation_scale="static"),
    ),
}
AS_READ = {
    "float activations": (transformers.Phi3Config(**SIZES), LobcqConfig(mode="w4a16")),
    "experts": (transformers.MixtralConfig(**SIZES, num_local_experts=4), LobcqConfig()),
    "biased experts": (transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), LobcqConfig()),
}
DIVIDED = (*TRACED, "float activations", "experts")
EXPERTS = {"whole experts": "experts", "biased experts": "biased experts"}
SUMS = ("self_attn.o_proj", "mlp.down_proj")
RANKS = (2, 4)
REFUSED = {
    ("two kv heads, biases, rotated int8", 4): ("layers.0.self_attn.k_proj: num_key_value_heads=2", "multiple of 4"),
    ("smoothed, of two formats", 4): ("layers.0.self_attn.o_proj [N=256, K=256]", "4 ranks", "of 128", "512 or more"),
    ("sequences", 2): ("ConfigError: model.layers.0.mlp.up_proj", "'sequence_parallel'"),
    ("as read", 2): ("ConfigError: weights are encoded as they are read by one rank", "quantize_folder"),
    ("fsdp", 2): ("ConfigError: fsdp_size=2: packed weights are divided by tensor and expert parallelism alone",),
}
"""What messages of jobs say on so many ranks."""


def float_model(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # so that predictions differ, and biases are none of zeros
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of both kinds: with a graph, and written by transformers."""
    where = tmp_path_factory.mktemp("folders")
    for name, (config, settings) in TRACED.items():
        saved(float_model(config), where / name, settings, batches() if settings.needs_calibration else None)
    for name, (config, settings) in AS_READ.items():
        float_model(config).save_pretrained(where / "float")
        opened(where / "float", quantization_config=LobcqQuantizationConfig(settings)).save_pretrained(where / name)
    return where


def jobs(folders, ranks):
    """What `found` is called with on each rank."""

    def opening(name, **settings):
        return {"folder": str(folders / name), "settings": settings}

    auto = {name: opening(name, tp_plan="auto") for name in DIVIDED}
    experts = {"tp_size": ranks, "ep_size": ranks}
    return auto | {
        "in bf16": opening("llama", tp_plan="auto", dtype="bfloat16"),
        "rows alone": opening("float activations", tp_plan={f"model.layers.*.{name}": "replicate" for name in SUMS}),
        "whole experts": opening("experts", distributed_config=experts),
        "biased experts": opening("biased experts", distributed_config=experts),
        "sequences": opening("llama", tp_plan={"model.layers.*.mlp.up_proj": "sequence_parallel"}),
        "as read": opening("float", tp_plan="auto", quantization_config={"quant_method": "lobcq"}),
        "fsdp": opening("llama", distributed_config={"fsdp_size": ranks}),
    }


@pytest.fixture(scope="module")
def groups(folders, tmp_path_factory):
    """What each rank of each group found."""
    where = tmp_path_factory.mktemp("ranks")
    (where / "jobs.json").write_text(json.dumps({count: jobs(folders, count) for count in RANKS}))
    program = [sys.executable, "-m", "tests.integrations.ranks", where / "jobs.json", where]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return {count: [torch.load(where / str(count) / str(rank)) for rank in range(count)] for count in RANKS}


@pytest.fixture(params=RANKS)
def ranks(request, groups):
    """What each rank of one group found."""
    return groups[request.param]


@pytest.fixture(scope="module")
def alone(folders):
    """What one process finds in a folder."""
    return cache(lambda name, **settings: found(folders / name, settings))


@pytest.mark.parametrize("name", [*DIVIDED, *EXPERTS])
def test_every_rank_gives_the_logits_and_tokens_of_one(groups, alone, name):
    """Up to the order of sums in fp32. An error in an activation's scale shows in the third digit."""
    whole = alone(EXPERTS.get(name, name))
    for rank in [rank for count, group in groups.items() if (name, count) not in REFUSED for rank in group]:
        torch.testing.assert_close(rank[name]["logits"], whole["logits"], atol=1e-5, rtol=1e-5)
        assert torch.equal(rank[name]["tokens"], whole["tokens"])


@pytest.mark.parametrize("name", [*DIVIDED, *EXPERTS])
def test_what_is_read_gets_its_whole_gradient_on_every_rank(groups, alone, name):
    whole = alone(EXPERTS.get(name, name))["gradient"]
    for rank in [rank for count, group in groups.items() if (name, count) not in REFUSED for rank in group]:
        assert (rank[name]["gradient"] - whole).norm() < 1e-5 * whole.norm()


def test_sums_are_rounded_once(ranks, alone):
    whole = alone("llama", dtype=torch.bfloat16)["logits"]
    assert whole.dtype == torch.bfloat16
    assert all(torch.equal(rank["in bf16"]["logits"], whole) for rank in ranks)


def test_rows_alone_change_no_bit(ranks, alone):
    whole = alone("float activations")
    for rank in ranks:
        assert torch.equal(rank["rows alone"]["logits"], whole["logits"])
        assert rank["rows alone"]["bytes"] < whole["bytes"]


def test_a_part_of_a_row_gets_the_codes_that_it_has_in_the_whole(ranks):
    x, ops = activation(), torch.ops.lobcq
    codes, selectors, scales, tensor_scale = ops.quantize_activation(x, universal_codebooks(8), 64)
    entries, int8_scales, int8_tensor_scale = ops.quantize_activation_int8(x, 64)
    finite = [row for row in range(len(x)) if row not in NOT_FINITE]
    parts = [rank["encoded"] for rank in ranks]
    for name, whole in {
        "codes": codes,
        "selectors": selectors,
        "scales": scales.view(torch.uint8),
        "entries": entries,
        "int8_scales": int8_scales.view(torch.uint8),
    }.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1)[finite], whole[finite]), name
    for part in parts:
        assert torch.equal(part["tensor_scale"][finite], tensor_scale[finite])
        assert torch.equal(part["int8_tensor_scale"][finite], int8_tensor_scale[finite])
    # A part of NaN is enough to make the sum NaN.
    assert all(parts[-1][name][list(NOT_FINITE)].isnan().all() for name in ("tensor_scale", "int8_tensor_scale"))


@pytest.mark.parametrize("name", DIVIDED)
def test_ranks_hold_each_byte_once(groups, alone, name):
    """Besides the zeros, and up to the kernels' padding; shares differ by one block array of seven."""
    whole = alone(name)["bytes"]
    for count, group in [one for one in groups.items() if (name, one[0]) not in REFUSED]:
        held = [rank[name]["bytes"] - rank[name]["zeros"] for rank in group]
        assert whole <= sum(held) < 1.02 * whole
        assert max(held) < 1.1 * whole / count


@pytest.mark.parametrize("name", EXPERTS)
def test_every_rank_holds_its_experts(ranks, alone, name):
    """Mixtral's other weights are divided too; gpt-oss has no plan for them."""
    whole, others = alone(EXPERTS[name])["bytes"], {"biased experts": 0.15}.get(name, 0.05)
    assert all(rank[name]["bytes"] < (1 / len(ranks) + others) * whole for rank in ranks)


@pytest.mark.parametrize(("name", "count"), REFUSED)
def test_every_rank_hears_why_not(groups, name, count):
    for rank in groups[count]:
        assert all(part in rank[name]["error"] for part in (*REFUSED[name, count], "Remedy: ")), rank[name]["error"]


def test_a_part_is_not_saved(ranks, alone):
    assert all("a part of the packed weights" in rank["llama"]["when saved"] for rank in ranks)
    assert "when saved" not in alone("llama")
