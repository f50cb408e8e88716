"""trace_module: a module's calls, in every form, become a flat graph; what cannot be captured says where and why."""

from __future__ import annotations

import re
from collections import namedtuple

import pytest
import torch
from torch import fx, nn

from lobcq_fx.errors import TraceError
from lobcq_fx.tracing.trace import trace_module, widen_batch
from tests.passes.graphs import Function, assert_metadata, aten, linear, run, targets, values

Pair = namedtuple("Pair", "left right")


class Calls(nn.Module):
    """Takes and returns nested structures, and a constant that is part of the graph."""

    def __init__(self):
        super().__init__()
        self.a, self.b = linear(32, 64), linear(32, 64, seed=1)

    def forward(self, batch, pair, *, scale=1.0, shift=None):
        first, (second, third) = pair
        out = self.a(batch["x"]) * scale + self.b(batch["y"]) - self.a(first + second + third)
        return {"out": out if shift is None else out + shift, "parts": [out.sum(-1), (out,)]}


def inputs(*leading):
    x = [values(*leading, 64, seed=seed) for seed in range(5)]
    return ({"x": x[0], "y": x[1]}, (x[2], (x[3], x[4])))


@torch.no_grad()
@pytest.mark.parametrize("leading", [(2, 3), (1, 3), (2, 1), (1, 1), (7, 5)])
@pytest.mark.parametrize("keywords", [{}, {"scale": 0.5}, {"shift": torch.ones(32)}])
def test_nested_structures_and_keyword_only_arguments(leading, keywords):
    model = Calls().eval()
    traced = trace_module(model, inputs(3, 4), keywords)
    call = inputs(*leading)
    flat = traced.calling.flatten(call, dict(keywords))
    actual = traced.calling.unflatten(traced.graph_module(*flat), call, keywords)
    expected = model(*call, **keywords)
    assert type(actual["parts"]) is list
    assert type(actual["parts"][1]) is tuple
    torch.testing.assert_close(actual, expected)
    assert_metadata(traced.graph_module, *flat)


def test_calls_by_keyword_alone_and_named_tuples():
    class Named(nn.Module):
        def forward(self, pair, factor):
            return Pair(pair.left * factor, pair.right + factor)

    x = values(3, 4)
    traced = trace_module(Named(), (), {"factor": x, "pair": [x, x] and Pair(x, x)})
    flat = traced.calling.flatten((), {"pair": Pair(x, 2 * x), "factor": x})
    actual = traced.calling.unflatten(traced.graph_module(*flat), (), {})
    assert type(actual) is Pair
    assert torch.equal(actual.left, x * x)


def test_the_graph_is_flat_and_free_of_export_s_guards():
    graph_module = trace_module(Calls(), inputs(3, 4)).graph_module
    assert type(graph_module.graph._codegen) is fx.graph.CodeGen
    assert {node.op for node in graph_module.graph.nodes} <= {"placeholder", "get_attr", "call_function", "output"}
    assert aten._assert_tensor_metadata.default not in targets(graph_module)
    assert [n.target for n in graph_module.graph.nodes if n.op == "get_attr"] == [
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
    ]


@pytest.mark.parametrize("training", [True, False])
def test_the_float_model_is_untouched(training):
    model = nn.Sequential(linear(32, 64), nn.Dropout(), nn.BatchNorm1d(32), linear(8, 32))
    model.train(training)
    model[1].eval()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    traced = trace_module(model, (values(4, 64),))
    assert [module.training for module in model] == [training, False, training, training]
    after = model.state_dict(keep_vars=True)
    for name, (value, copy) in before.items():
        assert after[name] is value
        assert torch.equal(value, copy)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in traced.graph_module.parameters())
    shared = dict(traced.graph_module.named_parameters())
    assert shared["0.weight"].data_ptr() == model[0].weight.data_ptr()  # the same memory, not a copy
    x = values(4, 64)
    torch.testing.assert_close(run(traced.graph_module, x), model.eval()(x))  # traced in eval mode: no dropout


def test_a_batch_of_one_becomes_dynamic():
    model = linear(32, 64)
    graph_module = trace_module(model, (values(1, 64),)).graph_module
    x = values(5, 64)
    torch.testing.assert_close(run(graph_module, x), model(x))
    assert widen_batch({"x": values(1, 3)})["x"].shape == (2, 3)
    assert widen_batch({"x": values(1, 3), "y": values(2, 3)})["x"].shape == (1, 3)
    assert widen_batch({"x": values(1, 3), "y": torch.tensor(1.0)})["x"].shape == (1, 3)


def branch(m, x):
    if x.sum() > 0:
        return m.layer(x)
    return x


def item(m, x):
    return m.layer(x) * range(100)[int(x.abs().max().item())]


@pytest.mark.parametrize("function", [branch, item])
def test_control_flow_on_values_names_module_file_line_and_remedy(function):
    inner = Function(function, layer=linear(64, 64))
    model = nn.Sequential(linear(64, 64), nn.Sequential(inner)).train()
    with pytest.raises(TraceError) as caught:
        trace_module(model, (values(2, 64),))
    message = str(caught.value)
    assert "cannot trace Sequential as one graph" in message
    assert "1.0 (Function)" in message
    assert re.search(r"graphs\.py:\d+ in forward|test_trace\.py:\d+", message)
    assert "Remedy: make that line independent of tensor values" in message
    assert model.training
    assert caught.value.__cause__ is not None


def test_an_error_of_the_model_s_own_is_located_too():
    model = nn.Sequential(linear(32, 64), linear(8, 31))
    with pytest.raises(TraceError, match=r"At 1 \(Linear\), .*linear\.py:\d+ in forward"):
        trace_module(model, (values(2, 64),))


class Unnamed(nn.Module):
    def forward(self, *tensors):
        return tensors[0]


class PositionalOnly(nn.Module):
    def forward(self, x, /):
        return x


@pytest.mark.parametrize("model", [Unnamed(), PositionalOnly()])
def test_unnamed_arguments_are_refused(model):
    with pytest.raises(TraceError, match="takes unnamed arguments; wrap it"):
        trace_module(model, (values(2, 2),))


def test_the_remedy_for_unnamed_arguments_is_a_forward_that_works():
    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tensors_0, tensors_1):
            return self.model(tensors_0, tensors_1)

    x = values(2, 2)
    with pytest.raises(TraceError, match=r"`def forward\(self, x\): return self.model\(x\)`"):
        trace_module(PositionalOnly(), (x,))
    with pytest.raises(
        TraceError, match=r"forward\(self, tensors_0, tensors_1\): return self.model\(tensors_0, tensors_1"
    ):
        trace_module(Unnamed(), (x, x))
    assert torch.equal(run(trace_module(Wrapped(Unnamed()), (x, x)).graph_module, x, x), x)


@pytest.mark.parametrize("made_in_it", [True, False])
@pytest.mark.parametrize("traced_in_it", [True, False])
def test_models_made_and_traced_in_inference_mode(made_in_it, traced_in_it):
    with torch.inference_mode(made_in_it):
        model = nn.Sequential(linear(32, 64), nn.BatchNorm1d(32)).eval()
    with torch.inference_mode(traced_in_it):
        traced = trace_module(model, (values(4, 64),))
    x = values(3, 64)
    torch.testing.assert_close(run(traced.graph_module, x), run(model, x))


def test_a_default_device_changes_nothing():
    model, x = linear(32, 64), values(4, 64)
    with torch.device("meta"):
        graph_module = trace_module(model, (x,)).graph_module
    torch.testing.assert_close(run(graph_module, x), model(x))


def test_examples_that_do_not_fit_are_refused():
    with pytest.raises(TraceError, match="missing a required argument: 'pair'"):
        trace_module(Calls(), ({},))
    with pytest.raises(TraceError, match="unexpected keyword argument 'z'"):
        trace_module(linear(2, 2), (values(2, 2),), {"z": 1})
    with pytest.raises(TraceError, match="hold no tensor"):
        trace_module(linear(2, 2), (3,))


def test_arguments_through_keyword_dictionaries_are_refused():
    class Open(nn.Module):
        def forward(self, x, **more):
            return x + more["y"]

    with pytest.raises(TraceError, match=r"Open.forward takes 'y' through \*\*kwargs; wrap it"):
        trace_module(Open(), (values(2, 3),), {"y": values(2, 3)})


def test_a_tied_weight_has_one_name():
    first, second = linear(64, 64, bias=False), linear(64, 64, bias=False)
    second.weight = first.weight
    graph_module = trace_module(nn.Sequential(first, second), (values(2, 64),)).graph_module
    assert len(graph_module.state_dict()) == 1
    (node,) = (node for node in graph_module.graph.nodes if node.op == "get_attr")
    assert len(node.users) == 2
