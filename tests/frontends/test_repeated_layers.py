"""Graphs of which three layers were traced, against those of which all were, and what is not made so."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from torch import fx
from torch.utils import _pytree as pytree

import lobcq_fx
from lobcq_fx.errors import TraceError
from lobcq_fx.frontends import front_end_of
from lobcq_fx.frontends.repeated_layers import trace_repeated
from lobcq_fx.frontends.static_cache_call import STATIC_CACHE
from lobcq_fx.frontends.tried import Tried
from lobcq_fx.tracing.trace import MAIN
from tests.families import CAUSAL_LMS, LLAMA, TOKENS
from tests.sweeps import sweep
from tests.traces import copied

COUNT = 5
SMALL = LLAMA | {"num_hidden_layers": COUNT}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "windows": lambda: transformers.MixtralConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    ),
    "other-names": lambda: transformers.GPT2Config(n_embd=72, n_layer=COUNT, n_head=4, n_positions=128, **TOKENS),
}


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)


def structure(graph_module):
    """Every node but for its name. Sizes are known by the first input that has them, whichever they are read from."""
    nodes = list(graph_module.graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    sizes = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        for size in node.meta["val"].shape:
            sizes.setdefault(str(size), len(sizes))

    def place(node):
        size = node.target is torch.ops.aten.sym_size.int
        return ("size", sizes[str(node.meta["val"])]) if size else ("node", places[node])

    def of(node):
        if node.target is torch.ops.aten.sym_size.int:
            return "size"
        arguments = pytree.tree_map_only(fx.Node, place, (node.args, node.kwargs))
        value = node.meta.get("val")
        shape = [one if isinstance(one, int) else None for one in value.shape] if hasattr(value, "shape") else None
        path = [one[0] for one in (node.meta.get("nn_module_stack") or {}).values()]
        return node.op, str(node.target), arguments, shape, getattr(value, "dtype", None), path

    return [of(node) for node in nodes]


@cache
def traces(name, static_cache):
    """A model, whether tracing left it as it was, its graphs of three layers, and those of all."""
    model = model_of(MODELS[name]())
    before = model.config.to_dict(), [id(one) for one in model.modules()]
    front_end = front_end_of(model)
    repeated = front_end.trace_repeated(model, static_cache=static_cache)
    after = model.config.to_dict(), [id(one) for one in model.modules()]
    return model, before == after, repeated, front_end.trace(model, None, static_cache=static_cache)


GRAPHS = [f"{name}, {kind}" for name in MODELS for kind in ("one graph", "both graphs")]


@pytest.mark.parametrize(
    "graphs", sweep(GRAPHS, ["llama, both graphs", "windows, one graph", "other-names, one graph"])
)
def test_the_graphs_are_those_of_a_trace_of_all_layers(graphs):
    name, _, kind = graphs.partition(", ")
    static_cache = kind == "both graphs"
    model, _, repeated, whole = traces(name, static_cache)
    assert repeated.graphs.keys() == whole.graphs.keys() == {MAIN, *([STATIC_CACHE] if static_cache else [])}
    for kind, one in whole.graphs.items():
        made = repeated.graphs[kind]
        assert made.calling == one.calling
        assert structure(made.graph_module) == structure(one.graph_module)
        tensors = dict(one.graph_module.named_parameters())
        assert {n: t.data_ptr() for n, t in made.graph_module.named_parameters()} == {
            n: t.data_ptr() for n, t in tensors.items()
        }
        made.graph_module.graph.lint()
    assert Tried.of(front_end_of(model), model, None, repeated).unlike == {}


def test_the_model_is_left_as_it_was():
    _, left, _, _ = traces("windows", False)
    assert left


def scaled(model):
    model.model.layers[4].self_attn.scaling *= 2


def without_a_bias(model):
    model.model.layers[4].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(72))


def hooked(model):
    model.model.layers[4].register_forward_hook(lambda module, args, output: output * 1.01)


def of_another_kind(model):
    model.model.layers[4].mlp.act_fn = torch.nn.GELU()


def shared(model):
    model.model.layers[4].mlp = model.model.layers[3].mlp


CHANGES = [scaled, without_a_bias, hooked, of_another_kind, shared]


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_differ_are_not_repeated(change):
    model = model_of(MODELS["llama"]())
    change(model)
    with pytest.raises(TraceError, match="its layers are not alike"):
        trace_repeated(model, static_cache=False)


@pytest.mark.parametrize("change", sweep(CHANGES, [hooked]))
def test_layers_that_differ_are_traced_one_by_one(change):
    """Whatever the difference, which the test above has by day, what follows is the same."""
    model = model_of(MODELS["llama"]())
    change(model)
    assert not traced(model).repeated


def traced(model):
    return Tried.by_tracing(front_end_of(model), model, None, static_cache=False).traced


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.GPT2Config(
            n_embd=72, n_layer=COUNT, n_head=4, scale_attn_by_inverse_layer_idx=True, **TOKENS
        ), "its layers are not alike"),
        (lambda: transformers.Gemma2Config(**SMALL, sliding_window=4), "its layers are not alike"),
        (CAUSAL_LMS["llama"], "no list of many layers"),
    ],
)  # fmt: skip
def test_models_of_other_layers_are_traced_layer_by_layer(config, message):
    with pytest.raises(TraceError, match=message):
        trace_repeated(model_of(config()), static_cache=False)


def test_a_number_that_goes_by_the_layer_s_place_is_seen(monkeypatch):
    model = model_of(MODELS["llama"]())
    places = {id(layer.mlp): place for place, layer in enumerate(model.model.layers)}
    forward = transformers.models.llama.modeling_llama.LlamaMLP.forward

    def by_place(self, x):
        return forward(self, x) / (1 + places[id(self)])

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", by_place)
    with pytest.raises(TraceError, match="takes 3 where a layer before it took 2"):
        trace_repeated(model, static_cache=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_that_only_calls_show_is_seen(monkeypatch, caplog, dtype):
    """A rule in the code of the model, of layers that nothing else tells apart. The fifth is not among the traced."""
    forward = transformers.models.llama.modeling_llama.LlamaMLP.forward
    model = model_of(MODELS["llama"](), dtype)
    fifth = {id(model.model.layers[4].mlp)}

    def ruled(self, x):
        return forward(self, x) * 1.25 if id(self) in fifth else forward(self, x)

    def whole(*_, **__):
        raise TraceError("all of them are traced")

    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(20)  # as much as attention and embedding are
    first = traced(model)
    assert first.repeated
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", ruled)
    monkeypatch.setattr(front_end_of(model).__class__, "trace_repeated", lambda *_, **__: first)
    monkeypatch.setattr(front_end_of(model).__class__, "trace", whole)
    with caplog.at_level("INFO"), pytest.raises(TraceError, match="all of them are traced"):
        traced(model)
    assert "the main graph that was made so is not the model" in caplog.text


@torch.no_grad()
def test_a_quantized_model_is_the_same(tmp_path, monkeypatch):
    model, _, *both = traces("llama", True)
    front_end = front_end_of(model).__class__
    of_three, of_all = (copied(graphs, model) for graphs in both)
    monkeypatch.setattr(front_end, "trace_repeated", lambda *_, **__: of_three)
    q = lobcq_fx.quantize(model)
    monkeypatch.setattr(front_end, "trace_repeated", lambda *_, **__: None)
    monkeypatch.setattr(front_end, "trace", lambda *_, **__: of_all)
    whole = lobcq_fx.quantize(model)
    ids = torch.arange(14).view(2, 7)
    assert torch.equal(q(ids).logits, whole(ids).logits)
    assert [one.layer for one in q.inventory.records] == [one.layer for one in whole.inventory.records]
    static = [one(ids, past_key_values=one.static_cache(9)).logits for one in (q, whole)]
    assert torch.equal(*static)
    q.save_pretrained(tmp_path / "q")
    assert torch.equal(lobcq_fx.load(tmp_path / "q")(ids).logits, whole(ids).logits)
