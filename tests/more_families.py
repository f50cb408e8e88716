"""A tiny random model of each family of transformers that is tested, by the model type of its configuration.

The families of `tests.families` are among them: those go through every test, all of these through one short one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    MT5EncoderModel,
    PreTrainedModel,
    T5EncoderModel,
    UMT5EncoderModel,
)
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention
from transformers.pytorch_utils import Conv1D

import lobcq_fx
from tests.families import CONVOLUTIONS, STACKS, VOCABULARY, fake_quantized, quantized_layers

LENGTH, PROMPT = 9, 6
TINY = {
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {
    **GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 100,
    "shared_expert_intermediate_size": 100,
}
ROUTED = {"n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "num_key_value_heads": 4,
}
HYBRID = {**GROUPED, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 4}
IMAGES = {"image_size": 16, "patch_size": 4, "num_channels": 3}
SOUND = {
    "conv_dim": (32,) * 3,
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
SAMPLES = 400
TWO_PARTS = {
    "decoder_layers": 1,
    "encoder_ffn_dim": 100,
    "decoder_ffn_dim": 100,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 2,
}
MELS = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64}


@dataclass(frozen=True)
class Family:
    """One kind of model. changes: what its configuration has beside, or instead of, `TINY`."""

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        return AutoConfig.for_model(self.model_type, **{**TINY, **self.changes})

    def model(self) -> PreTrainedModel:
        """With larger weights than at first, which make all results alike, and with biases and norms that differ.

        States of scans remember: at first, and with larger weights all the more, they forget within a token.
        """
        torch.manual_seed(0)
        model = self.untrained().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("A_log"):
                    parameter.uniform_(-5, -1)
                elif parameter.dim() > 1:
                    parameter.mul_(4)
                else:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    def untrained(self) -> PreTrainedModel:
        return AutoModel.from_config(self.config)

    def quantized(self, model: PreTrainedModel) -> lobcq_fx.QuantizedModel:
        return lobcq_fx.quantize(model)

    def call(self, model: PreTrainedModel) -> dict[str, Tensor]:
        raise NotImplementedError

    def results(self, called: nn.Module, call: Mapping[str, Tensor]) -> Tensor:
        """What a call gives, where nothing is masked."""
        return unmasked(called(**call)[0], call)


class LanguageModel(Family):
    def untrained(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(self.config)

    def quantized(self, model: PreTrainedModel) -> lobcq_fx.QuantizedModel:
        return lobcq_fx.quantize(model, static_cache=False)

    def call(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return tokens(padded=slice(0, 2))

    def results(self, called: nn.Module, call: Mapping[str, Tensor]) -> Tensor:
        return unmasked(called(**call, **positions(called, call)).logits, call)

    def results_by_steps(self, q: nn.Module, call: Mapping[str, Tensor]) -> Tensor:
        """The same by a prompt, and then token by token on its cache."""
        given, cache, logits = {**call, **positions(q, call)}, None, []
        for start, stop in ((0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))):
            part = {name: value[:, start:stop] for name, value in given.items()}
            part["attention_mask"] = call["attention_mask"][:, :stop]
            out = q(**part, past_key_values=cache, use_cache=True)
            cache = out[q.calling.cache_name]
            logits.append(out.logits)
        return unmasked(torch.cat(logits, dim=1), call)


class TextEncoder(Family):
    def call(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return tokens(padded=slice(PROMPT, None))


class EncoderOfOwnSizes(TextEncoder):
    """A model whose configuration calls its sizes by names of its own, and takes no others."""

    @property
    def config(self) -> Any:
        return AutoConfig.for_model(self.model_type, vocab_size=VOCABULARY, **self.changes)


class EncoderOfTwoParts(TextEncoder):
    """The encoder alone of a model that has a decoder too."""

    def untrained(self) -> PreTrainedModel:
        classes = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}
        return classes[self.model_type](self.config)


class EncoderDecoder(Family):
    """Both parts, called with the first tokens of an answer."""

    def untrained(self) -> PreTrainedModel:
        return AutoModelForSeq2SeqLM.from_config(self.config)

    def call(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {**tokens(padded=slice(PROMPT, None)), "decoder_input_ids": answer()}

    def results(self, called: nn.Module, call: Mapping[str, Tensor]) -> Tensor:
        return called(**call).logits

    def results_by_steps(self, q: nn.Module, call: Mapping[str, Tensor]) -> Tensor:
        """The same from the encoder's hidden state, token by token."""
        given, ids = dict(call), call["decoder_input_ids"]
        given["encoder_outputs"] = q.get_encoder()(**{name: call[name] for name in call if "decoder" not in name})
        cache, logits = None, []
        for step in range(ids.shape[1]):
            out = q(**given | {"decoder_input_ids": ids[:, step : step + 1]}, past_key_values=cache)
            cache = out.past_key_values
            logits.append(out.logits)
        return torch.cat(logits, dim=1)


class Transcriber(EncoderDecoder):
    def untrained(self) -> PreTrainedModel:
        return AutoModelForSpeechSeq2Seq.from_config(self.config)

    def call(self, model: PreTrainedModel) -> dict[str, Tensor]:
        frames = 2 * model.config.max_source_positions
        return {"input_features": noise(3, model.config.num_mel_bins, frames), "decoder_input_ids": answer()}


class ImageEncoder(Family):
    def call(self, model: PreTrainedModel) -> dict[str, Tensor]:
        size = (model.config.image_size,) * 2 if isinstance(model.config.image_size, int) else model.config.image_size
        return {"pixel_values": noise(3, 3, *size)}


class SpeechEncoder(Family):
    def call(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {"input_values": noise(3, SAMPLES)}

    def quantized(self, model: PreTrainedModel) -> lobcq_fx.QuantizedModel:
        return lobcq_fx.quantize(model, example_inputs={"input_values": noise(2, SAMPLES)})


def tokens(padded: slice) -> dict[str, Tensor]:
    """Three sequences, the first of them padded."""
    ids = torch.randint(3, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[0, padded] = mask[0, padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answer() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, PROMPT), generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def positions(called: nn.Module, call: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For models that take them, positions that count from the first token that is not masked."""
    takes = called.calling.inputs if hasattr(called, "calling") else inspect.signature(called.forward).parameters
    return {"position_ids": (call["attention_mask"].cumsum(-1) - 1).clamp(min=0)} if "position_ids" in takes else {}


def unmasked(values: Tensor, call: Mapping[str, Tensor]) -> Tensor:
    mask = call.get("attention_mask")
    return values if mask is None or values.shape[:2] != mask.shape else values[mask.bool()]


class AttentionOfLinears(nn.Module):
    """What an nn.MultiheadAttention computes whose keys are its values, by linears called as the parts of its weight.

    attention: batch first, with biases; q has its weight in two parts, one for queries, one for keys and values.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, width = attention.num_heads, attention.embed_dim
        weights, biases = (one.split([width, 2 * width]) for one in (attention.in_proj_weight, attention.in_proj_bias))
        self.in_proj_weight_part, self.in_proj_weight_part_1 = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        assert key is value
        keys, values = self.in_proj_weight_part_1(key).chunk(2, dim=-1)
        heads = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.in_proj_weight_part(query), keys, values)
        )
        attended = nn.functional.scaled_dot_product_attention(*heads)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return linear


def of_linears(model: PreTrainedModel) -> None:
    """Change the model in place, so that its projections are all linears."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            model.set_submodule(name, AttentionOfLinears(module))


@torch.no_grad()
def linears_that_run(family: Family, model: PreTrainedModel) -> set[str]:
    """Names of the linears that a call runs, convolutions that are such among them, and of weights of no module."""
    seen: set[str] = set()
    of_linears(model)
    hooks = [
        module.register_forward_pre_hook(lambda *_, names=names: seen.update(names))
        for name, module in model.named_modules()
        for names in [[name] if _runs_linear(module) else _parameters(name, module)]
    ]
    family.results(model, family.call(model))
    for hook in hooks:
        hook.remove()
    return seen


def _runs_linear(module: nn.Module) -> bool:
    if isinstance(module, CONVOLUTIONS):
        apart = all(size <= step for size, step in zip(module.kernel_size, module.stride, strict=True))
        padded = module.padding != "valid" and any(module.padding)
        return apart and module.groups == 1 and not padded
    return isinstance(module, (nn.Linear, Conv1D))


def _parameters(name: str, module: nn.Module) -> list[str]:
    """Of experts, and of XLNet's attention, which multiplies by einsum."""
    names = ("q", "k", "v", "o", "r") if isinstance(module, XLNetRelativeAttention) else STACKS
    return [f"{name}.{one}" for one in names if isinstance(getattr(module, one, None), nn.Parameter)]


@dataclass(frozen=True)
class Agreement:
    """Differences over the spread of the float model with fake-quantized layers.

    median, largest: of the quantized model. by_steps: the largest with a cache. beyond: share of tokens whose results
    differ by more than a tenth of the spread, in the call or by steps. effect: of the float model, in norm.
    """

    median: float
    largest: float
    by_steps: float
    beyond: float
    effect: float


@torch.no_grad()
def agreement(family: Family, model: PreTrainedModel, q: lobcq_fx.QuantizedModel) -> Agreement:
    of_linears(model)
    call = family.call(model)
    original, actual = family.results(model, call), family.results(q, call)
    with fake_quantized(model, quantized_layers(q)):
        expected = family.results(model, call)
    stepwise = family.results_by_steps(q, call) if isinstance(family, (LanguageModel, EncoderDecoder)) else actual
    spread = expected.std()
    difference, by_steps = ((result - expected).abs() / spread for result in (actual, stepwise))
    return Agreement(
        median=float(difference.median()),
        largest=float(difference.max()),
        by_steps=float(by_steps.max()),
        beyond=float((torch.maximum(difference, by_steps).amax(-1) > 0.1).float().mean()),
        effect=float((original - expected).norm() / expected.norm()),
    )


def families(kind: type[Family], names: str, **changes: Any) -> dict[str, Family]:
    return {name: kind(name, changes) for name in names.split()}


RECURRENT: dict[str, Family] = {
    **families(LanguageModel, "lfm2", **{**HYBRID, "layer_types": ["conv", "full_attention"]}),
    **families(LanguageModel, "mamba"),
    **families(LanguageModel, "qwen3_5_text", **HYBRID, **DELTA),
    **families(LanguageModel, "falcon_h1", **{**GROUPED, **MAMBA2}, mamba_d_ssm=128),
}
"""One for each kind of state: tests/frontends/test_recurrent.py has them."""
DISTINCT: dict[str, Family] = {
    **families(
        LanguageModel,
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo olmo2 nemotron stablelm starcoder2 cohere2"
        " granite helium smollm3 glm4 persimmon apertus exaone4 hunyuan_v1_dense diffllama bitnet"
        " nanochat doge",
        **GROUPED,
    ),
    **families(LanguageModel, "gpt2 gpt_neox gpt_bigcode opt falcon bloom mpt biogpt xglm"),
    **families(LanguageModel, "gptj", rotary_dim=8),
    **families(LanguageModel, "gpt_neo", attention_types=[[["local"], 1]], window_size=4),
    **families(LanguageModel, "mixtral qwen2_moe qwen3_moe", **EXPERTS),
    **RECURRENT,
    **families(
        LanguageModel,
        "nemotron_h",
        **{**GROUPED, "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "moe"]},
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=4,
        ssm_state_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=100,
        moe_shared_expert_intermediate_size=100,
    ),
    **families(
        TextEncoder,
        "bert roberta distilbert electra albert deberta-v2 mpnet modernbert nomic_bert convbert esm roformer"
        " eurobert clip_text_model",
    ),
    **families(EncoderOfOwnSizes, "xlnet", d_model=64, n_layer=1, n_head=4, d_inner=100),
    **families(EncoderOfTwoParts, "t5", d_kv=16),
    **families(ImageEncoder, "vit beit dinov2 dinov3_vit clip_vision_model siglip_vision_model", **IMAGES),
    **families(SpeechEncoder, "wav2vec2 hubert", **SOUND),
}
DAILY = (
    "cohere2",  # attention and feed-forward side by side, layers without positions among layers with a window
    "diffllama",  # attention from which attention is subtracted
    "doge",  # a mask that is computed
    "gpt_bigcode",  # one key and value for all heads
    "gptj",  # rotations of neighbours
    "gpt_neo",  # attention to a window, unscaled
    "qwen2_moe",  # experts, and one that all tokens go through
    "nemotron_h",  # scans, attention and experts
    "albert",  # one layer run several times
    "deberta-v2",  # positions that are multiplied with queries and keys
    "modernbert",  # windows, a gated feed-forward
    "convbert",  # convolutions beside attention
    "siglip_vision_model",  # images, pooled by an nn.MultiheadAttention
    "wav2vec2",  # sound
)
"""Of `DISTINCT` one for each way to compute that has no test of its own. The others are tested at night."""
TWINS: dict[str, Family] = {
    **families(
        LanguageModel,
        "ministral ministral3 internlm3 iquestcoder hyperclovax seed_oss vaultgemma olmo3 cohere glm arcee"
        " ernie4_5 jais2",
        **GROUPED,
    ),
    **families(LanguageModel, "gpt_neox_japanese"),
    **families(LanguageModel, "codegen", rotary_dim=8),
    **families(LanguageModel, "olmoe phimoe granitemoe minimax_m2 gpt_oss", **EXPERTS),
    **families(LanguageModel, "hunyuan_v1_moe", moe_topk=2, **EXPERTS),
    **families(
        LanguageModel,
        "llama4_text",
        intermediate_size_mlp=100,
        interleave_moe_layer_step=1,
        attention_chunk_size=32,
        **EXPERTS,
    ),
    **families(
        LanguageModel,
        "ernie4_5_moe",
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=0,
        moe_num_shared_experts=1,
        **EXPERTS,
    ),
    **families(LanguageModel, "glm4_moe", **ROUTED, **EXPERTS),
    **families(LanguageModel, "deepseek_v2 deepseek_v3", **{**EXPERTS, **ROUTED, **LATENT}),
    **families(LanguageModel, "falcon_mamba"),
    **families(LanguageModel, "mamba2", num_heads=8, head_dim=16, chunk_size=4),
    **families(LanguageModel, "bamba", **{**GROUPED, **MAMBA2}, num_hidden_layers=2, attn_layer_indices=[1]),
    **families(
        LanguageModel,
        "granitemoehybrid",
        **{**EXPERTS, **MAMBA2},
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=100,
    ),
    **families(
        LanguageModel,
        "jamba",
        **EXPERTS,
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    **families(
        LanguageModel,
        "zamba2",
        num_hidden_layers=2,
        num_key_value_heads=4,
        layer_types=["linear_attention", "hybrid"],
        hybrid_layer_ids=[1],
        mamba_ngroups=1,
        n_mamba_heads=8,
        mamba_headdim=16,
        chunk_size=4,
        num_mem_blocks=1,
    ),
    **families(LanguageModel, "qwen3_next qwen3_5_moe_text", **{**EXPERTS, **HYBRID, **DELTA}),
    **families(LanguageModel, "olmo_hybrid", **{**HYBRID, **DELTA}),
    **families(
        LanguageModel,
        "lfm2_moe",
        **EXPERTS,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
    ),
    **families(TextEncoder, "xlm-roberta xlm-roberta-xl camembert data2vec-text ernie rembert"),
    **families(EncoderOfTwoParts, "mt5 umt5", d_kv=16),
    **families(EncoderDecoder, "longt5", d_kv=16, d_ff=100, decoder_start_token_id=0),
    **families(
        EncoderDecoder,
        "bart marian mbart pegasus m2m_100 blenderbot blenderbot-small plbart bigbird_pegasus nllb-moe pegasus_x",
        **TWO_PARTS,
        num_experts=2,
    ),
    **families(Transcriber, "whisper", **TWO_PARTS, **MELS),
    **families(ImageEncoder, "deit ijepa data2vec-vision", **IMAGES),
    **families(SpeechEncoder, "unispeech-sat", **SOUND),
}
"""Their graphs are those of families above, or of tests of their own, to a detail."""
FAMILIES = DISTINCT | TWINS

REFUSED: dict[str, Family] = {
    **families(LanguageModel, "minimax", **GROUPED),
    **families(
        LanguageModel,
        "recurrent_gemma",
        **GROUPED,
        num_hidden_layers=3,
        block_types=["recurrent", "recurrent", "attention"],
        lru_width=64,
        attention_window_size=8,
    ),
    **families(
        LanguageModel,
        "kimi_linear",
        **{**EXPERTS, **ROUTED, **LATENT, **HYBRID, "num_key_value_heads": 4, "head_dim": None},
    ),
}
"""Families that are not supported yet."""
