"""What is found out about a float model by calling it: caches, positions and losses that a graph cannot have."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer

import lobcq_fx
from lobcq_fx.errors import CallError, TraceError
from lobcq_fx.frontends import float_causal_lm, transformers_trace
from lobcq_fx.frontends.transformers_trace import trace_causal_lm
from tests.families import LLAMA, TOKENS, trace_main
from tests.frontends.test_output_settings import IDS, call
from tests.more_families import FAMILIES

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS}


def lfm2():
    return transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(**SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    )


def test_a_cache_of_another_kind_is_named_before_anything_is_traced():
    model = transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(d_model=64, n_layer=1, n_head=4, d_inner=96, **TOKENS)
    )
    message = "takes no past_key_values, but mems.*Supported are models that cache plain keys and values.*Remedy"
    with pytest.raises(TraceError, match=message):
        lobcq_fx.quantize(model)


def test_a_layer_that_is_not_understood_is_named(monkeypatch):
    monkeypatch.setattr(float_causal_lm, "KNOWN", (DynamicLayer,))
    with pytest.raises(TraceError, match=r"Lfm2ForCausalLM keeps a LinearAttentionLayer in its cache\. Supported"):
        lobcq_fx.quantize(lfm2())


def test_a_scan_that_the_graph_holds_as_a_loop_is_refused(monkeypatch):
    """As of a family whose scan is none that is known: the graph has as many chunks as the example."""
    monkeypatch.setattr(transformers_trace, "scans_as_operators", lambda model: nullcontext())
    model = FAMILIES["mamba2"].model()
    with pytest.raises(TraceError, match="Mamba2ForCausalLM scans in a loop of its own: argument input_ids has size"):
        lobcq_fx.quantize(model)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def test_the_remedy_for_other_caches_works():
    torch.manual_seed(0)
    model = lfm2().eval()
    traced = trace_main(Logits(model), {"input_ids": IDS})
    longer = torch.arange(3, 36).view(3, 11)
    torch.testing.assert_close(call(traced, longer), model(longer).logits)


def larger(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


@torch.no_grad()
def test_a_static_cache_with_which_the_model_computes_something_else_is_refused():
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], window_size=4, **TOKENS,
    )  # fmt: skip
    model = larger(transformers.GPTNeoForCausalLM(config))
    traced = trace_causal_lm(model)
    torch.testing.assert_close(call(traced, IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    q = lobcq_fx.quantize(model)
    assert "its results differ from the model's" in q.refused_graphs["static_cache"]
    with pytest.raises(CallError, match="no graph for static caches: its results differ from the model's"):
        q(IDS, past_key_values=q.static_cache(8))


@torch.no_grad()
def test_positions_by_a_rule_of_the_model_s_own_have_to_be_passed():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SMALL, is_decoder=True, max_position_embeddings=64)
    model = larger(transformers.RobertaForCausalLM(config))
    traced = trace_causal_lm(model)
    with pytest.raises(CallError, match="position_ids is missing: the float model counts by a rule of its own"):
        call(traced, IDS)
    positions = torch.arange(5).expand(2, 5)
    torch.testing.assert_close(
        call(traced, IDS, position_ids=positions).logits, model(IDS, position_ids=positions).logits
    )


@torch.no_grad()
def test_a_loss_without_a_shift_is_refused():
    config = transformers.BartConfig(
        d_model=64, decoder_layers=1, decoder_ffn_dim=96, decoder_attention_heads=4, **TOKENS
    )
    traced = trace_causal_lm(transformers.BartForCausalLM(config).eval())
    with pytest.raises(CallError, match="labels: the float model's loss is not that of the next token"):
        call(traced, IDS, labels=IDS)


PACKED = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])


@torch.no_grad()
def test_packed_rows_are_refused_where_the_float_model_keeps_them_apart():
    torch.manual_seed(0)
    model = larger(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1})))
    q = lobcq_fx.quantize(model, static_cache=False)
    apart = model(IDS, position_ids=PACKED, use_cache=False).logits
    together = model(IDS, position_ids=PACKED, attention_mask=torch.ones_like(IDS)).logits
    assert not torch.allclose(apart, together, rtol=1e-2)
    with pytest.raises(CallError, match=r"position_ids do not count on within a row.*pass each as a row"):
        q(IDS, position_ids=PACKED, use_cache=False)
    model.config.use_cache = q.config.use_cache = False
    with pytest.raises(CallError, match="position_ids do not count on"):
        q(IDS, position_ids=PACKED)
    served = [
        {"position_ids": PACKED, "attention_mask": torch.ones_like(IDS), "use_cache": False},
        {"position_ids": PACKED, "use_cache": True},
        {"position_ids": torch.arange(7, 12)[None], "use_cache": False},
    ]
    for keywords in served:
        expected, actual = model(IDS, **keywords).logits, q(IDS, **keywords).logits
        assert (actual - expected).norm() < 0.3 * expected.norm()
    step = torch.compile(lambda ids, positions: q(ids, position_ids=positions).logits, backend="eager", fullgraph=True)
    torch.testing.assert_close(step(IDS, PACKED[1:]), q(IDS, position_ids=PACKED[1:]).logits)
    with pytest.raises(RuntimeError, match="position_ids do not count on"):
        step(IDS, PACKED)


INPUTS = {
    "a list of numbers": ({"input_ids": [[3, 4]]}, "input_ids is a list: pass a tensor of"),
    "one dimension": ({"input_ids": IDS[0]}, r"input_ids is a torch.int64 of \[5\]: pass an int64 of \[batch"),
    "floats": ({"input_ids": IDS.float()}, r"input_ids is a torch.float32 of \[2, 5\]"),
    "a mask that is a list": ({"input_ids": IDS, "attention_mask": [[1] * 5] * 2}, "attention_mask is a list"),
    "a mask of one row": ({"input_ids": IDS, "attention_mask": IDS[:1]}, r"attention_mask has shape \[1, 5\]: pass"),
    "a legacy cache": (
        {"input_ids": IDS, "past_key_values": ((torch.zeros(2, 2, 1, 18),) * 2,) * 2},
        r"past_key_values is a tuple: pass transformers.DynamicCache\(past_key_values\)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return trace_causal_lm(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_in_other_forms_are_refused(llama, case):
    keywords, message = INPUTS[case]
    with pytest.raises(CallError, match=message):
        call(llama, **keywords)


@torch.no_grad()
def test_the_remedy_for_legacy_caches_works(llama):
    first = call(llama, IDS)
    legacy = tuple((layer.keys, layer.values) for layer in first.past_key_values.layers)
    expected = call(llama, IDS[:, :2], past_key_values=first.past_key_values).logits
    assert torch.equal(call(llama, IDS[:, :2], past_key_values=transformers.DynamicCache(legacy)).logits, expected)
