"""Warming up: every kind of call runs once, on its own weights."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lobcq_fx
from lobcq_fx.graph.run_on_zeros import run_on_zeros
from lobcq_fx.kernels.bind import rows_to_warm, weight_layout
from tests.families import causal_lm, quantized_causal_lm
from tests.passes.graphs import linear, lobcq, parameter, prepacked_graph
from tests.passes.test_order import lowered

pytestmark = pytest.mark.skipif(weight_layout(torch.device("cpu")) is None, reason="the CPU core was not built")

op = lobcq.linear_prepacked


class Calls(TorchDispatchMode):
    """Which overloads run, and how many rows they get."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "linear_prepacked" in str(func):
            self.found.append((func, tuple(args[0].shape), args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "fused"), [("llama", {op.rms_norm, op.residual, op.silu_mul}), ("nemotron", None)])
def test_every_kind_of_call_of_a_model_runs_once(family, fused):
    """One call for each of the four groups of a block."""
    q = lobcq_fx.quantize(causal_lm(family, num_hidden_layers=1).bfloat16(), static_cache=False)
    lowered(q)
    with Calls() as calls:
        count = run_on_zeros([q.graph_module], 5)
    called = [func for func, *_ in calls.found if func is not op.default]  # which the default implementations call
    assert count == len(called) == 4
    assert fused is None or set(called) == fused
    assert {shape[0] for _, shape, _ in calls.found} == {5}
    assert {dtype for _, _, dtype in calls.found} == {torch.bfloat16}


def test_float_activations_with_a_residual_and_a_static_scale():
    members = {"a": linear(64, 64), "b": linear(64, 64, bias=False, seed=1), "s": parameter(64)}
    for config in (lobcq_fx.LobcqConfig(mode="w4a16"), lobcq_fx.LobcqConfig(activation_scale="static")):
        graph_module = prepacked_graph(
            lambda m, x: m.a(x) + m.b(torch.relu(x)), config=config, data=torch.randn(2, 3, 64), **members
        )
        assert run_on_zeros([graph_module], 3) == 2
        assert run_on_zeros([graph_module, graph_module], 3) == 2


def test_a_graph_without_metadata_runs_too():
    graph_module = prepacked_graph(lambda m, x: m.a(x), dtype=torch.bfloat16, a=linear(48, 64))
    for node in graph_module.graph.nodes:
        node.meta.clear()
    with Calls() as calls:
        assert run_on_zeros([graph_module], 3) == 1
    assert calls.found == [(op.default, (3, 64), torch.bfloat16)]


def test_the_cpu_has_nothing_to_compile():
    assert rows_to_warm(torch.device("cpu"), 4096) == []
    quantized_causal_lm("llama")[1].warmup()
