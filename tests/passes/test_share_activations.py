"""share_activations: matmuls that read the same activation in the same way read one encoded activation."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.config import LobcqConfig
from lobcq_fx.passes.share_activations import ShareActivations
from tests.passes.graphs import (
    Function,
    assert_metadata,
    assert_unchanged,
    linear,
    lobcq,
    nodes,
    normalized,
    observe,
    rewritten,
    run,
    values,
)  # fmt: skip

QUANTIZE = lobcq.quantize_activation.default
ENCODED = {
    "w4a4": (QUANTIZE, lobcq.linear.default, 4),  # codes, selectors, scales, tensor scale
    "w4a8": (lobcq.quantize_activation_int8.default, lobcq.linear.int8_activation, 3),
}


def siblings(function=None):
    members = {name: linear(32, 64, seed=seed) for seed, name in enumerate("qkv")}
    return Function(function or (lambda m, x: m.q(x) + m.k(x) * m.v(x)), **members)


def graph(config=None, function=None, data=None):
    graph_module = normalized(siblings(function))
    if data is not None:
        observe(graph_module, config)
        run(graph_module, data)
    rewritten(graph_module, config)
    return graph_module


@pytest.mark.parametrize("mode", ENCODED)
@pytest.mark.parametrize("scale", ["per_token", "static"])
def test_three_readers_share_one_encoded_activation(scale, mode):
    quantize, op, parts = ENCODED[mode]
    graph_module = graph(LobcqConfig(activation_scale=scale, mode=mode), data=values(2, 3, 64))
    assert len(nodes(graph_module, quantize)) == 3
    calls = [values(2, 3, 64), values(1, 1, 64), values(5, 2, 64)]
    before = [run(graph_module, x) for x in calls]

    assert ShareActivations()(graph_module).modified
    (shared,) = nodes(graph_module, quantize)
    assert len(shared.users) == parts
    assert {tuple(node.args[:parts]) for node in nodes(graph_module, op)} == {tuple(shared.users)}
    assert all(torch.equal(run(graph_module, x), y) for x, y in zip(calls, before, strict=True))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    assert_metadata(graph_module, values(4, 2, 64))
    assert_unchanged(ShareActivations(), graph_module)


NEAR_MISSES = {
    "different activations": (LobcqConfig(), lambda m, x: m.q(x) + m.k(x * 2) * m.v(x + 1), 3),
    "different array sizes": (LobcqConfig(overrides={"k": {"format": "8x32"}, "v": {"format": "8x16"}}), None, 3),
    "different codebooks": (LobcqConfig(overrides={"k": {"format": "4x64"}, "v": {"format": "2x64"}}), None, 3),
    "different kinds": (LobcqConfig(overrides={"k": {"mode": "w4a8"}, "v": {"mode": "w4a16"}}), None, 1),
    "float activations": (LobcqConfig(mode="w4a16"), None, 0),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_stay_apart(case):
    config, function, count = NEAR_MISSES[case]
    graph_module = graph(config, function)
    assert len(nodes(graph_module, QUANTIZE)) == count
    assert_unchanged(ShareActivations(), graph_module)


def test_a_static_scale_and_a_per_token_one_stay_apart():
    config = LobcqConfig(overrides={"k": {"activation_scale": "static"}})
    graph_module = graph(config, data=values(2, 3, 64))
    assert ShareActivations()(graph_module).modified  # q and v
    assert sorted(node.args[3] is None for node in nodes(graph_module, QUANTIZE)) == [False, True]


def test_static_scales_of_different_values_stay_apart():
    config = LobcqConfig(activation_scale="static")
    graph_module = graph(config, data=values(2, 3, 64))
    graph_module.k.activation_scale *= 2
    graph_module.v.activation_scale *= 3
    assert_unchanged(ShareActivations(), graph_module)


def written_between(m, x):
    y = x * 1
    first = m.q(y)
    y.view(-1, 4)[1].mul_(3)
    return first + m.k(y) * m.v(y)


def test_a_write_between_two_readers_keeps_them_apart():
    graph_module = graph(function=written_between)
    x = values(2, 3, 64)
    expected = run(graph_module, x)
    assert ShareActivations()(graph_module).modified  # k and v, which both read after the write
    assert len(nodes(graph_module, QUANTIZE)) == 2
    assert torch.equal(run(graph_module, x), expected)
    assert_unchanged(ShareActivations(), graph_module)


def test_a_write_elsewhere_does_not():
    graph_module = graph(function=lambda m, x: torch.relu_(m.q(x)) + m.k(x) * m.v(x))
    assert ShareActivations()(graph_module).modified
    assert len(nodes(graph_module, QUANTIZE)) == 1
