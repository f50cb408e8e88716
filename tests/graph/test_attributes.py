"""Dotted attribute names, and nodes that carry metadata."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lobcq_fx.format import FormatSpec, encode, universal_codebooks
from lobcq_fx.graph.attributes import (
    add_call,
    add_get_attr,
    delete_attribute,
    free_name,
    get_attribute,
    has_attribute,
    register_attribute,
)  # fmt: skip
from lobcq_fx.graph.fake_tensors import fake_mode
from lobcq_fx.modules.packed_weight import PackedWeight
from tests.passes.graphs import aten, graph_of, linear, nodes, values


def test_register_get_delete():
    module = nn.Module()
    register_attribute(module, "a.b.scale", torch.tensor(2.0))
    register_attribute(module, "a.child", nn.Linear(2, 2))
    register_attribute(module, "a.w", nn.Parameter(torch.zeros(2)))
    assert float(get_attribute(module, "a.b.scale")) == 2
    assert {name for name, _ in module.named_buffers()} == {"a.b.scale"}
    assert {name for name, _ in module.named_parameters()} == {"a.w", "a.child.weight", "a.child.bias"}
    delete_attribute(module, "a.child")
    delete_attribute(module, "a.b.scale")
    assert not has_attribute(module, "a.child")
    assert not has_attribute(module, "a.b.scale")
    with pytest.raises(AttributeError):
        get_attribute(module, "a.nothing.here")


def test_free_names_are_numbered_and_never_inside_a_tensor():
    module = nn.Module()
    assert free_name(module, "layer", "weight") == "layer.weight"
    register_attribute(module, "layer.weight", torch.zeros(1))
    register_attribute(module, "layer.weight_1", torch.zeros(1))
    assert free_name(module, "layer", "weight") == "layer.weight_2"
    module.w = nn.Parameter(torch.zeros(1))
    assert free_name(module, "w", "scale") == "w_scale"
    packed = PackedWeight(encode(values(4, 64), FormatSpec(), universal_codebooks(8)))
    register_attribute(module, "block.w", packed)
    assert free_name(module, "block.w", "scale") == "block.w_scale"


def test_new_nodes_carry_metadata_and_provenance():
    graph_module = graph_of(linear(32, 64))
    (node,) = nodes(graph_module, aten.linear.default)
    register_attribute(graph_module, "new.scale", torch.zeros(32))
    scale = add_get_attr(graph_module, "new.scale")
    assert scale.meta["val"].shape == (32,)
    assert fake_mode(graph_module.graph) is scale.meta["val"].fake_mode
    with graph_module.graph.inserting_after(node):
        product = add_call(graph_module.graph, aten.mul.Tensor, (node, scale), like=node)
    assert product.meta["val"].shape == node.meta["val"].shape
    assert product.meta["nn_module_stack"] is node.meta["nn_module_stack"]


def test_a_graph_without_metadata_gets_none():
    graph_module = fx.symbolic_trace(nn.Linear(4, 4))
    assert fake_mode(graph_module.graph) is None
    register_attribute(graph_module, "scale", torch.zeros(4))
    assert "val" not in add_get_attr(graph_module, "scale").meta


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_packed_weights_are_bytes_that_no_cast_touches(cast):
    packed = PackedWeight(encode(values(4, 64), FormatSpec(), universal_codebooks(8)))
    before = {name: part.clone() for name, part in packed.state_dict().items()}
    getattr(packed, cast)()
    for name, part in packed.state_dict().items():
        assert part.dtype == before[name].dtype
        assert torch.equal(part.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8))
    packed.to("meta")
    assert {part.device.type for part in packed.state_dict().values()} == {"meta"}
    assert packed.scales.dtype == torch.float8_e4m3fn
    assert packed.tensor_scale.shape == ()
