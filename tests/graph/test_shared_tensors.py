"""Two graphs over one set of tensors."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lobcq_fx.graph.attributes import delete_attribute, register_attribute
from lobcq_fx.graph.shared_tensors import drop_shared, share
from tests.passes.graphs import Function, graph_of, linear, run, values


def pair():
    """Graphs of one layer: the second scales by a constant of its own, and both have one called `offset`."""
    layer = linear(64, 64)
    first = Function(lambda m, x: m.layer(x) + m.offset, layer=layer)
    second = Function(lambda m, x: m.layer(x) * m.scale + m.offset, layer=layer)
    first.register_buffer("offset", torch.tensor(1.0))
    second.register_buffer("offset", torch.tensor(2.0))
    second.register_buffer("scale", torch.tensor(3.0))
    return first, second, graph_of(first), graph_of(second)


def shared():
    first, second, root, other = pair()
    drop_shared(other, root)
    assert not list(other.parameters())  # nothing that could keep the layer's memory
    return first, second, root, share(other, root)


def test_each_graph_computes_what_it_was_traced_from():
    first, second, root, other = shared()
    x = values(2, 3, 64)
    torch.testing.assert_close(run(root, x), first(x))
    torch.testing.assert_close(run(other, x), second(x))


def test_equal_tensors_are_one_and_others_get_a_free_name():
    _, _, root, other = shared()
    assert {name for name, _ in root.named_buffers()} == {"offset", "offset_1", "scale"}
    assert (float(root.offset), float(root.offset_1), float(root.scale)) == (1, 2, 3)
    assert {id(tensor) for tensor in other.parameters()} == {id(tensor) for tensor in root.parameters()}
    assert {str(node.target) for node in other.graph.find_nodes(op="get_attr")} >= {"offset_1", "scale"}


def test_constants_of_equal_values_are_one():
    _, second, root, other = pair()
    register_attribute(root, "scale", second.scale.clone())
    drop_shared(other, root)
    share(other, root)
    assert {name for name, _ in root.named_buffers()} == {"offset", "offset_1", "scale"}


def test_what_happens_to_one_happens_to_the_other():
    _, _, root, other = shared()
    register_attribute(other, "layer.extra", torch.ones(2))
    assert torch.equal(root.layer.extra, torch.ones(2))
    delete_attribute(root, "layer.extra")
    assert not hasattr(other.layer, "extra")
    root.to("meta")
    assert {tensor.device.type for tensor in (*other.parameters(), *other.buffers())} == {"meta"}
    assert not any(name.startswith("root") for name, _ in other.named_modules())


def test_copies_share_with_each_other_alone():
    _, second, root, other = shared()
    twins = copy.deepcopy({"root": root, "other": other})
    assert {id(p) for p in twins["root"].parameters()} == {id(p) for p in twins["other"].parameters()}
    assert not {id(p) for p in twins["root"].parameters()} & {id(p) for p in root.parameters()}
    x = values(2, 3, 64)
    torch.testing.assert_close(run(twins["other"], x), second(x))
    nn.init.zeros_(twins["root"].layer.weight)
    torch.testing.assert_close(run(other, x), second(x))
    twins["root"].to("meta")
    assert {tensor.device.type for tensor in twins["other"].buffers()} == {"meta"}
    assert {tensor.device.type for tensor in other.buffers()} == {"cpu"}
