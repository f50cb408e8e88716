"""What a configuration says about outputs, and output classes of a model's own."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
import transformers

import lobcq_fx
from lobcq_fx.errors import CallError, TraceError
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.causal_lm_trial import PROMPT
from lobcq_fx.frontends.output_types import import_output_types, output_type
from lobcq_fx.frontends.transformers_trace import trace_causal_lm
from tests.families import ONE_LAYER, VOCABULARY, causal_lm, quantized_causal_lm, trace_main
from tests.more_families import FAMILIES
from tests.sweeps import sweep

IDS = torch.arange(3, 13).view(2, 5)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "ernie4_5_moe", "phimoe", "jamba")
CHANGING = {"output_hidden_states": True, "output_attentions": True, "use_cache": True, "return_dict": False}
"""What changes results by saying something other than encoders' defaults, or might."""
FLAGS = ("output_hidden_states", "output_attentions", "use_cache", "return_dict")
SAID = [{name: value} for name in FLAGS for value in (True, False)]


def call(traced, *args, **kwargs):
    outputs = traced.graph_module(*traced.calling.flatten(args, kwargs))
    return traced.calling.unflatten(outputs, args, kwargs)


def flagged(config, **flags):
    config._attn_implementation = "eager"
    for name, value in flags.items():
        setattr(config, name, value)
    return config


@torch.no_grad()
@pytest.mark.parametrize("value", [True, False])
def test_a_llama_returns_what_its_configuration_says_of_cache_and_form(value):
    model = causal_lm("llama-tied")
    flagged(model.config, **dict.fromkeys(FLAGS, value))
    q = lobcq_fx.quantize(model, static_cache=False)
    assert [getattr(model.config, name) for name in FLAGS] == [value] * len(FLAGS)  # as its owner left it
    assert not q.config.output_hidden_states
    assert not q.config.output_attentions
    # The float model cannot be called with return_dict=False in its configuration: it reads its own parts by name.
    flagged(model.config, output_hidden_states=False, output_attentions=False, return_dict=True)
    expected, actual = model(IDS, return_dict=value), q(IDS)
    assert type(actual) is type(expected)
    assert len(actual) == len(expected) == (2 if value else 1)
    assert actual[0].shape == expected[0].shape == (2, 5, VOCABULARY)
    assert (actual[0] - expected[0]).norm() < 0.5 * expected[0].norm()
    assert len(q(IDS, use_cache=True)) == 2
    assert q(IDS, return_dict=True, use_cache=True).past_key_values.get_seq_length() == 5
    settings = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert q.generate(IDS, **settings, use_cache=True).shape == (2, 8)


@torch.no_grad()
@pytest.mark.parametrize("flags", sweep(SAID, [{name: value} for name, value in CHANGING.items()]), ids=str)
def test_a_bert_returns_what_its_configuration_says(flags):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=32)
    model = transformers.BertModel(flagged(config, **flags)).eval()
    expected, actual = model(IDS), call(trace_main(model), IDS)
    assert type(actual) is type(expected)
    torch.testing.assert_close(tuple(actual.values() if isinstance(actual, dict) else actual), expected[:])
    assert getattr(model.config, next(iter(flags))) == next(iter(flags.values()))


@torch.no_grad()
def test_a_loss_that_settings_add_to_is_refused_and_routers_logits_are_left_out():
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    config = transformers.MixtralConfig(**ONE_LAYER, **experts)
    model = transformers.MixtralForCausalLM(config).eval()
    traced = trace_causal_lm(model)
    assert model.config.output_router_logits
    torch.testing.assert_close(call(traced, IDS).logits, model(IDS).logits)
    with pytest.raises(CallError, match="labels: the float model's loss is not that of the next token"):
        call(traced, IDS, labels=IDS)


@torch.no_grad()
@pytest.mark.parametrize("family", sweep(MIXTURES, ["mixtral"]))
def test_a_mixture_that_is_to_return_routers_logits_is_quantized_without_them(family):
    """With a cache and a mask, transformers' own loss of the routers fails."""
    torch.manual_seed(0)
    model = replace(FAMILIES[family], changes={**FAMILIES[family].changes, "output_router_logits": True}).model()
    q = lobcq_fx.quantize(model)
    assert model.config.output_router_logits
    assert not q.config.output_router_logits
    prompt = q(IDS, use_cache=True)
    assert set(prompt) == {"logits", q.calling.cache_name}
    assert type(prompt) is type(model(IDS))
    with pytest.raises(CallError, match="labels: the float model's loss is not that of the next token: compute it"):
        q(IDS, labels=IDS)


def test_a_language_model_that_fails_with_a_cache_is_refused_with_a_remedy_that_it_has():
    class Uncached(transformers.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
            tried = past_key_values is not None and not torch.compiler.is_compiling()
            if tried and attention_mask.shape[1] == PROMPT + 1:
                raise ValueError("no such step")
            return super().forward(input_ids, attention_mask, past_key_values=past_key_values, **kwargs)

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    model = Uncached(transformers.LlamaConfig(**ONE_LAYER)).eval()
    with pytest.raises(TraceError, match=r"Uncached itself fails.*no such step.*wrap it in a torch\.nn\.Module"):
        lobcq_fx.quantize(model)
    q = lobcq_fx.quantize(Logits(model), example_inputs=IDS)
    assert q(IDS).shape == (*IDS.shape, VOCABULARY)


def test_a_model_with_outputs_that_would_be_lost_is_refused():
    class Talkative(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.hidden_states = (output.logits,)
            return output

    with pytest.raises(TraceError, match="Talkative returns hidden_states besides logits and cache, which would be"):
        lobcq_fx.quantize(Talkative(transformers.LlamaConfig(**ONE_LAYER)))


@pytest.mark.parametrize(
    "name",
    [
        "Tensor",
        "os.path",
        "torch.nn.Linear",
        "transformers.utils.ModelOutput",
        "transformers.models.llava.modeling_llava.LlavaModel",
        "transformers.models.llava.modeling_llava.ModelOutput",
        "transformers.cli.serve.ModelOutput",
        "transformers.models.llava.modeling_llava",
        "transformers.models.no_such.modeling_no_such.Output",
        "transformers.models.llava.modeling_llava.LlavaCausalLMOutputWithPast.x",
    ],
)
def test_only_output_classes_of_transformers_are_looked_up(name):
    with pytest.raises(ValueError, match=r"output_type is |cannot be imported"):
        output_type(name)


def naming(*names):
    leaf = {"type": None, "context": None, "children_spec": []}
    parts = [{"type": name, "context": '["logits"]', "children_spec": [leaf]} for name in names]
    return json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": parts}])


def test_no_module_is_imported_that_defines_no_model():
    home = "transformers.models.llava"
    before = set(sys.modules)
    import_output_types(naming("os.path.X"))
    with pytest.raises(ValueError, match="no output class of transformers"):
        import_output_types(naming(f"{home}.convert_llava_weights_to_hf.X"))
    assert set(sys.modules) == before
    with pytest.raises(ValueError, match=r"modeling_gone, which defines the model's outputs, cannot be imported"):
        import_output_types(naming(f"{home}.modeling_gone.X"))


def test_an_output_class_without_a_cache_is_no_language_model_s():
    calling = quantized_causal_lm("llama")[1].calling.to_dict()
    with pytest.raises(
        ValueError, match="'BaseModelOutput': BaseModelOutput has no field for a loss, logits or a cache"
    ):
        CausalLMCall.from_dict({**calling, "output_type": "BaseModelOutput"})
