"""emit: one plan for several traces of a model, whose matmuls become the same ops on the same packed weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.config import LobcqConfig
from lobcq_fx.encoding import encode_weights
from lobcq_fx.errors import TraceError
from lobcq_fx.float_weights import FloatWeights
from lobcq_fx.graph.shared_tensors import drop_shared, share
from lobcq_fx.modules.packed_weight import PackedWeight
from lobcq_fx.passes.emit import Emit
from lobcq_fx.passes.prepack import Prepack, weights_as_stored
from lobcq_fx.plan import QuantizationPlan
from tests.passes.graphs import (
    Function,
    assert_metadata,
    assert_unchanged,
    aten,
    linear,
    lobcq,
    nodes,
    normalized,
    run,
    targets,
    values,
)  # fmt: skip


class Layer(nn.Linear):
    """A linear whose bias may be computed."""

    shift: float | None = None

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias if self.shift is None else self.bias + self.shift)


class Two(nn.Module):
    """Layers `a` and `b`, of which `a` may be called twice, and a product with a bare [K, N] parameter."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.w = linear(64, 64), Layer(64, 64), nn.Parameter(values(64, 96))
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def plain(m, x):
    return m.b(torch.relu(m.a(m.a(x)))) @ m.w


def written_differently(m, x):
    return torch.matmul(m.b(m.a(m.a(x)).clamp(min=0)), m.w)


def pair(config=None, second=written_differently, first=plain):
    """The first graph with its weights encoded and emitted, the second, not yet, on its tensors; and the pass."""
    config, model = config or LobcqConfig(), Two(first)
    root = normalized(model)
    model.function = second
    other = normalized(model)
    drop_shared(other, root)
    plan = QuantizationPlan.of(root, config)
    weights = CodebookSets.universal(set(plan.formats)).weights
    activations = {spec: -codebooks.flip(1) for spec, codebooks in weights.items()}
    emit = Emit(plan, CodebookSets(weights, activations))
    encode_weights(plan, FloatWeights(root), emit.codebooks)
    emit(root)
    return root, share(other, root), emit


CONFIGS = {
    "w4a4": LobcqConfig(),
    "w4a8": LobcqConfig(mode="w4a8"),
    "w4a16": LobcqConfig(mode="w4a16"),
    "mixed": LobcqConfig(overrides={"a": {"format": "16x32"}, "b": {"mode": "w4a16"}}),
    "some": LobcqConfig(exclude=("b",)),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_it_computes_the_same_from_the_same_tensors(config):
    root, other, emit = pair(CONFIGS[config])
    before = {name: id(tensor) for name, tensor in root.named_buffers()}
    assert len(nodes(other, aten.linear.default)) == 4
    assert emit(other).modified
    assert len(nodes(other, aten.linear.default)) == (1 if config == "some" else 0)
    assert {name: id(tensor) for name, tensor in root.named_buffers()} == before
    for x in (values(2, 3, 64), values(1, 1, 64), values(4, 7, 64)):
        assert torch.equal(run(other, x), run(root, x))
        assert_metadata(other, x)
    assert {str(n.target) for n in other.graph.find_nodes(op="get_attr")} == {
        str(n.target) for n in root.graph.find_nodes(op="get_attr")
    }
    assert_unchanged(emit, other)


def test_a_bias_that_only_the_second_graph_computes_keeps_its_weight_as_it_is_stored():
    def computed(m, x):
        m.b.shift = 0.0
        return plain(m, x)

    root, other, emit = pair(second=computed)
    emit(other)
    stored = weights_as_stored(root.graph) | weights_as_stored(other.graph)
    assert stored == {"b.weight"}
    x = values(2, 3, 64)
    expected = run(root, x)
    torch.testing.assert_close(run(other, x), expected)
    for graph_module in (root, other):
        assert Prepack(Reversed(), stored)(graph_module).modified
        assert len(nodes(graph_module, lobcq.linear.default)) == 1
    packed = {name: module for name, module in root.named_modules() if isinstance(module, PackedWeight)}
    assert {name: module.layout is None for name, module in packed.items()} == {
        "a.weight": False,
        "b.weight": True,
        "w": False,
    }
    assert packed["a.weight"].layout.packed == 2  # `a` and `w`, each once


class Reversed:
    """A weight layout that counts what it packs."""

    packed, stacks = 0, False

    def pack(self, parts, spec, columns):
        type(self).packed += 1
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])

    def unpack(self, prepacked, spec, rows, columns):
        raise NotImplementedError

    def tables(self, codebooks):
        return codebooks.view(torch.uint8)


OTHERS = {
    "a matmul less": (lambda m, x: m.b(m.a(x).clamp(min=0)) @ m.w, "it has 3 matmuls, the graph that it follows 4"),
    "another order": (lambda m, x: m.a(m.b(torch.relu(m.a(x)))) @ m.w, "it runs a matmul in 'b' where .* in 'a'"),
    "another weight": (
        lambda m, x: m.b(torch.relu(m.a(m.a(x)))) @ m.b.weight,
        "its matmul in b reads b.weight, that of the graph it follows w",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_graphs_that_differ_are_refused_and_left_as_they_are(case):
    second, message = OTHERS[case]
    _, other, emit = pair(second=second)
    before = targets(other)
    with pytest.raises(TraceError, match=message):
        emit(other)
    assert targets(other) == before


def test_a_graph_may_leave_out_all_matmuls_of_optional_modules_and_no_part_of_them():
    cases = {
        "all of them": (lambda m, x: m.b(torch.relu(x)) @ m.w, None),
        "a part": (lambda m, x: m.b(m.a(x)) @ m.w, "it has 3 matmuls, the graph that it follows 2"),
        "another": (lambda m, x: m.a(m.a(x)) @ m.w, "it has 3 matmuls, the graph that it follows 2"),
    }
    for second, message in cases.values():
        root, other = normalized(Two(plain)), normalized(Two(second))
        plan = QuantizationPlan.of(root, LobcqConfig(), optional=frozenset({"a"}))
        if message is None:
            assert [planned.path for _, planned in plan.pair(other)] == ["b", ""]
            assert [planned.path for _, planned in plan.pair(root)] == ["a", "a", "b", ""]
            continue
        with pytest.raises(TraceError, match=message):
            plan.pair(other)


def test_a_tied_weight_that_stays_in_float_is_found_under_its_packed_name():
    model = Function(lambda m, x: m.a(x) + m.a.weight.sum(), a=linear(64, 64))
    root, other = normalized(model), normalized(model)
    drop_shared(other, root)
    plan = QuantizationPlan.of(root, LobcqConfig())
    emit = Emit(plan, CodebookSets.universal(set(plan.formats)))
    encode_weights(plan, FloatWeights(root), emit.codebooks)
    other = share(other, root)
    assert emit(root).modified
    assert emit(other).modified
    x = values(2, 3, 64)
    assert torch.equal(run(other, x), run(root, x))


def test_a_graph_that_reads_a_weight_in_float_that_is_let_go_is_refused():
    model = Function(lambda m, x: m.a(x), a=linear(64, 64))
    plan = QuantizationPlan.of(normalized(model), LobcqConfig())
    model.function = lambda m, x: m.a(x) + m.a.weight.sum()
    with pytest.raises(TraceError, match=r"it reads a\.weight in float too, in .*sum"):
        plan.pair(normalized(model))
