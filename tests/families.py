"""Tiny random models of many families, and the float models with fake-quantized layers they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lobcq_fx
from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, encode_int8, matmul, universal_codebooks
from lobcq_fx.frontends import front_end_of
from lobcq_fx.tracing.trace import MAIN, TracedModel
from lobcq_fx.tracing.wrappers import unwrapped
from tests.sweeps import sweep

VOCABULARY = 96
# Feed-forward 172 and hidden 72 leave tails of 44 and 8 columns after the last whole block array of 64.
LLAMA = {
    "hidden_size": 72,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE_LAYER = LLAMA | {"num_hidden_layers": 1}
"""For families whose layers are all of one kind: tracing, which takes the tests' time, takes as long for each."""
NEOX = {key: value for key, value in ONE_LAYER.items() if key not in ("num_key_value_heads", "head_dim")}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CAUSAL_LMS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama-tied": lambda: transformers.LlamaConfig(**ONE_LAYER, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**ONE_LAYER, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**ONE_LAYER),
    "qwen3": lambda: transformers.Qwen3Config(**ONE_LAYER),
    "gemma2": lambda: transformers.Gemma2Config(**LLAMA, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(**LLAMA, sliding_window=4),
    "phi3": lambda: transformers.Phi3Config(**{**ONE_LAYER, "hidden_size": 64, "head_dim": 16}),
    "olmo2": lambda: transformers.Olmo2Config(**ONE_LAYER),
    "gpt2": lambda: transformers.GPT2Config(n_embd=72, n_layer=2, n_head=4, n_positions=128, **TOKENS),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**{**NEOX, "hidden_size": 64}),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=72, ffn_dim=172, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=72,
        max_position_embeddings=128, **TOKENS,
    ),
    "falcon": lambda: transformers.FalconConfig(
        hidden_size=72, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=128, **TOKENS
    ),
    "bloom": lambda: transformers.BloomConfig(hidden_size=72, n_layer=2, n_head=4, **TOKENS),
    "nemotron": lambda: transformers.NemotronConfig(**ONE_LAYER),
}  # fmt: skip


def causal_lm(family: str, **changes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CAUSAL_LMS[family]()
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    # Random initialisation is so small that every prediction looks alike; larger weights make them differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""What the parameters of routed experts are called."""

WITH_STATIC_CACHE = ("llama", "mistral", "gemma2", "gemma3", "gpt2", "bloom", "opt", "phi3")
"""Families that tests give both graphs: in what a cache, masks and positions are, the others are as one of these."""

BY_DAY = ("llama", "mistral", "gemma2", "gpt2", "bloom", "opt")
"""One family of a kind: Gemma 3's windows are among those of Gemma 2, and Phi-3 is a Llama with joined projections."""

EVERY_CAUSAL_LM = sweep(CAUSAL_LMS, BY_DAY)
"""For parametrizations: by day one family of a kind, at night all."""

EVERY_WITH_STATIC_CACHE = sweep(WITH_STATIC_CACHE, BY_DAY)


def quantized_causal_lm(
    family: str, static_cache: bool | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, lobcq_fx.QuantizedModel]:
    """A family's float and quantized model, for tests that leave both as they are."""
    return _quantized(family, family in WITH_STATIC_CACHE if static_cache is None else static_cache, dtype)


@cache
def _quantized(family: str, static_cache: bool, dtype: torch.dtype) -> tuple[PreTrainedModel, lobcq_fx.QuantizedModel]:
    model = causal_lm(family).to(dtype)
    return model, lobcq_fx.quantize(model, static_cache=static_cache)


def own_causal_lm(family: str, dtype: torch.dtype = torch.float32) -> lobcq_fx.QuantizedModel:
    """A quantized model for a test that changes it."""
    return deepcopy(quantized_causal_lm(family, dtype=dtype)[1])


@contextmanager
def fake_quantized(
    model: nn.Module, layers: list[str], spec: FormatSpec | None = None, mode: str = "w4a4", exact: bool = False
) -> Iterator[nn.Module]:
    """The float model with decoded weights and fake-quantized activations in the named modules.

    Independent of tracing, passes and ops: it replaces the modules' forward and calls the format alone. With `exact`
    the tensor scales are applied after the product, as the format's matmul does, so that not even rounding differs.
    """
    spec = spec or FormatSpec()
    named = dict.fromkeys(layers)  # one may run twice, as in ALBERT
    modules = [model.get_submodule(layer) for layer in named if not is_parameter(model, layer)]
    others = [layer for layer in named if is_parameter(model, layer)]
    stacks = [layer for layer in others if layer.rpartition(".")[2] in STACKS]
    experts = [model.get_submodule(owner) for owner in dict.fromkeys(one.rpartition(".")[0] for one in stacks)]
    for module in experts:
        module.forward = experts_forward(module, spec, mode, exact)
    for module in modules:
        if isinstance(module, CONVOLUTIONS):
            module.forward = _convolution_forward(module, spec, mode, exact)
            continue
        weight = module.weight.detach()
        weight = weight.t() if isinstance(module, Conv1D) else weight
        module.forward = _forward(weight, module.bias, spec, mode, exact)
    try:
        with FakeQuantizedEinsums([model.get_parameter(layer) for layer in others], spec, mode, exact):
            yield model
    finally:
        for module in (*modules, *experts):
            del module.forward


def is_parameter(model: nn.Module, layer: str) -> bool:
    """Whether a layer is a parameter of the module that runs it, as the weights of experts are, and XLNet's."""
    owner, _, name = layer.rpartition(".")
    return isinstance(getattr(model.get_submodule(owner), name, None), nn.Parameter)


def experts_forward(module: nn.Module, spec: FormatSpec, mode: str, exact: bool) -> Callable[..., Tensor]:
    """What the module of a mixture's experts computes, expert by expert, each projection a fake-quantized linear."""
    gated = hasattr(module, "gate_up_proj")
    transposed = gated and getattr(module, "is_transposed", True)  # Llama 4's has no such flag
    up, down = (
        [
            _forward(weight.t() if transposed else weight, bias, spec, mode, exact)
            for weight, bias in zip(
                getattr(module, name).detach(), getattr(module, f"{name}_bias", [None] * 1000), strict=False
            )
        ]
        for name in ("gate_up_proj" if gated else "up_proj", "down_proj")
    )
    activate = module._apply_gate if gated and hasattr(module, "_apply_gate") else module.act_fn

    def routed(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        results = hidden_states.new_zeros((*top_k_index.shape, hidden_states.shape[-1]), dtype=dtype)
        for expert in range(len(up)):
            tokens, places = (top_k_index == expert).nonzero(as_tuple=True)
            hidden = down[expert](activate(up[expert](hidden_states[tokens])))
            results[tokens, places] = hidden * top_k_weights[tokens, places, None]
        return results.sum(dim=1).to(hidden_states.dtype)

    def by_expert(hidden_states: Tensor) -> Tensor:
        """Llama 4 gives every expert all tokens, those that are not for it as zeros."""
        results = []
        for expert, rows in enumerate(hidden_states.view(len(up), -1, hidden_states.shape[-1])):
            gate, value = up[expert](rows).chunk(2, dim=-1)
            results.append(down[expert](value * module.act_fn(gate)))
        return torch.cat(results)

    return routed if hasattr(module, "_apply_gate") or not gated else by_expert


def _forward(
    weight: Tensor, bias: Tensor | None, spec: FormatSpec, mode: str, exact: bool
) -> Callable[[Tensor], Tensor]:
    codebooks = universal_codebooks(spec.num_codebooks)
    encoded_weight = encode(weight, spec, codebooks, search_scales=True)
    decoded_weight = decode(encoded_weight)
    float_bias = None if bias is None else bias.float()

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        if mode == "w4a8":
            encoded = encode_int8(rows, spec.array_size)
        elif mode == "w4a4":
            encoded = encode(rows, spec, codebooks, absmax_row_scale(rows))
        if mode != "w4a16":
            rows = decode(encoded)
        if mode != "w4a16" and exact:
            out = matmul(encoded, encoded_weight, float_bias)
        else:
            out = nn.functional.linear(rows, decoded_weight, float_bias)
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])

    return forward


def _convolution_forward(module: nn.Module, spec: FormatSpec, mode: str, exact: bool) -> Callable[[Tensor], Tensor]:
    """A convolution whose windows do not overlap, a fake-quantized linear of each; one window in three dimensions."""
    linear = _forward(module.weight.detach().flatten(1), module.bias, spec, mode, exact)

    def forward(x: Tensor) -> Tensor:
        if x.dim() == 5:
            assert x.shape[2:] == module.kernel_size
            return linear(x.flatten(1))[..., None, None, None]
        image = x if x.dim() == 4 else x[..., None]
        kernel, stride = ((*one, 1)[:2] for one in (module.kernel_size, module.stride))
        rows = nn.functional.unfold(image, kernel, stride=stride).transpose(1, 2)
        sizes = [(size - k) // s + 1 for size, k, s in zip(image.shape[2:], kernel, stride, strict=True)]
        return linear(rows).transpose(1, 2).unflatten(2, sizes[: x.dim() - 2])

    return forward


class FakeQuantizedEinsums(TorchFunctionMode):
    """Within, XLNet's projections, whose weights are parameters [H, heads, D], are fake-quantized linears."""

    def __init__(self, parameters: list[nn.Parameter], *settings: Any) -> None:
        super().__init__()
        self.parameters, self.settings = {id(parameter) for parameter in parameters}, settings

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and len(args) == 3 and id(args[2]) in self.parameters:
            equation, x, weight = args
            rows = weight.detach().flatten(1)
            if equation == "ibh,hnd->ibnd":
                return _forward(rows.t(), None, *self.settings)(x).unflatten(-1, weight.shape[1:])
            assert equation == "ibnd,hnd->ibh"
            return _forward(rows, None, *self.settings)(x.flatten(2))
        return func(*args, **(kwargs or {}))


def quantized_layers(q: nn.Module) -> list[str]:
    return [record.layer for record in q.inventory.quantized]


def trace_main(model: nn.Module, example_inputs: Any = None) -> TracedModel:
    """A model's main graph, as `quantize` traces it."""
    model = unwrapped(model)
    return front_end_of(model).trace(model, example_inputs, static_cache=False).graphs[MAIN]
