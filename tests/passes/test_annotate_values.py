"""annotate_values: the metadata of a graph that comes from a file, against that of the graph that was traced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx

import lobcq_fx
from lobcq_fx.passes.annotate_values import AnnotateValues
from lobcq_fx.storage.graph_json import graph_from_json, graph_to_json
from lobcq_fx.tracing.example import EXAMPLE, InputExample
from lobcq_fx.tracing.sizes import fixed_size
from tests.families import VOCABULARY, causal_lm, own_causal_lm
from tests.passes.graphs import assert_metadata, assert_unchanged, linear, quantized, values
from tests.sweeps import sweep

CPU = torch.device("cpu")


def sizes(value: Tensor) -> list[int]:
    """In the example."""
    return [size if isinstance(size, int) else size.node.hint for size in value.shape]


def stored(q: lobcq_fx.QuantizedModel) -> lobcq_fx.QuantizedModel:
    """On the graph that files hold."""
    q._restore()
    return q


def from_file(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same tensors, the graph as a file keeps it."""
    other = copy.deepcopy(graph_module)
    other.graph = graph_from_json(graph_to_json(graph_module.graph))
    assert not any("val" in node.meta for node in other.graph.nodes)
    return other


@pytest.mark.parametrize("family", sweep(["llama", "gemma2", "gpt2", "bloom"], ["llama", "gemma2", "gpt2"]))
def test_values_are_those_of_the_trace(family):
    layers = {"num_hidden_layers": 2 if family == "gemma2" else 1}  # its layers are of two kinds
    q = stored(lobcq_fx.quantize(causal_lm(family, **layers).bfloat16(), static_cache=False))
    loaded = from_file(q.graph_module)
    assert AnnotateValues(CPU)(loaded).modified
    for actual, expected in zip(loaded.graph.nodes, q.graph_module.graph.nodes, strict=True):
        value = expected.meta.get("val")
        if isinstance(value, Tensor):
            described = actual.meta["val"]
            assert (described.dtype, sizes(described)) == (value.dtype, sizes(value)), actual.name
            dynamic, traced = (sum(fixed_size(size) is None for size in v.shape) for v in (described, value))
            assert dynamic == traced, actual.name
    assert_unchanged(AnnotateValues(CPU), loaded)


def test_symbols_stand_for_the_sizes_of_a_call():
    q = stored(own_causal_lm("llama"))
    loaded = from_file(q.graph_module)
    AnnotateValues(CPU)(loaded)
    ids = torch.randint(3, VOCABULARY, (3, 7))
    assert_metadata(loaded, *q.calling.flatten((ids,), {}))


def test_a_graph_of_a_file_without_examples_stays():
    loaded = from_file(quantized(lambda m, x: m.a(x), a=linear(48, 64)))
    for node in loaded.graph.find_nodes(op="placeholder"):
        del node.meta[EXAMPLE]
    assert_unchanged(AnnotateValues(CPU), loaded)


def test_a_traced_graph_stays():
    assert_unchanged(AnnotateValues(CPU), quantized(lambda m, x: m.a(x), a=linear(48, 64)))


def test_inputs_survive_a_second_file():
    loaded = from_file(quantized(lambda m, x: m.a(x), a=linear(48, 64)))
    (one,) = from_file(loaded).graph.find_nodes(op="placeholder")
    assert one.meta[EXAMPLE] == InputExample("float32", tuple(values(2, 3, 64).shape), (0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "load"}, "describes no tensor"),
        ({"shape": [2, -1]}, "describes no tensor"),
        ({"shape": [2, "x"]}, "describes no tensor"),
        ({"shape": [True, 2]}, "describes no tensor"),
        ({"shape": [2**62, 2**62]}, "describes no tensor"),
        ({"dynamic": [2]}, "has no dimension 2"),
    ],
    ids=str,
)
def test_a_damaged_example_is_refused(change, message):
    example = {"dtype": "int64", "shape": [2, 8], "dynamic": [0, 1]}
    assert InputExample.from_dict(example).to_dict() == {"dtype": "int64", "shape": (2, 8), "dynamic": (0, 1)}
    with pytest.raises(ValueError, match=message):
        InputExample.from_dict({**example, **change})


@pytest.mark.parametrize("example", [InputExample("int64", (2, 3, 64), ()), InputExample("float32", (2, 3, 40), ())])
def test_a_graph_that_its_examples_do_not_fit_stays(example, caplog):
    loaded = from_file(quantized(lambda m, x: m.a(x) + x[..., :48].sqrt_(), a=linear(48, 64)))
    (placeholder,) = loaded.graph.find_nodes(op="placeholder")
    placeholder.meta[EXAMPLE] = example
    assert_unchanged(AnnotateValues(CPU), loaded)
    assert not any("val" in node.meta for node in loaded.graph.nodes)
    assert "do not fit it" in caplog.text
