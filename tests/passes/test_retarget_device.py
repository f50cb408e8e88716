"""retarget_device: devices that tracing wrote into the graph."""

from __future__ import annotations

import torch

from lobcq_fx.passes.retarget_device import RetargetDevice
from tests.passes.graphs import Function, assert_unchanged, aten, graph_of, linear, nodes, values

META = torch.device("meta")
CPU = torch.device("cpu")


def positions():
    return Function(lambda m, x: x + torch.arange(x.shape[1], device=x.device)[:, None])


def test_created_tensors_follow_to_the_new_device():
    graph_module = graph_of(positions())
    (arange,) = nodes(graph_module, aten.arange.default)
    assert arange.kwargs["device"] == CPU
    assert RetargetDevice(META)(graph_module).modified
    (arange,) = nodes(graph_module, aten.arange.default)
    assert arange.kwargs["device"] == META
    assert "device(type='meta')" in graph_module.code
    assert graph_module(values(2, 3, 64).to(META))[0].device == META
    assert_unchanged(RetargetDevice(META), graph_module)
    assert RetargetDevice(CPU)(graph_module).modified
    x = values(4, 7, 64)
    assert torch.equal(graph_module(x)[0], positions()(x))


def test_a_graph_without_devices_is_unchanged():
    assert_unchanged(RetargetDevice(META), graph_of(linear(32, 64)))
