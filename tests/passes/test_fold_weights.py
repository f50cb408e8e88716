"""fold_weights: weights made of constants alone become constants; what else takes part stays in the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.passes.fold_weights import FoldWeights
from tests.passes.graphs import (
    Function,
    assert_metadata,
    assert_unchanged,
    decoded,
    graph_of,
    linear,
    names,
    parameter,
    run,
    values,
)  # fmt: skip

functional = nn.functional
WIDE = {"w": parameter(96, 64)}

FOLDED = {
    "split": (lambda m, x: functional.linear(x, m.w.split([32, 64])[1]), WIDE),
    "chunk": (lambda m, x: functional.linear(x, m.w.chunk(3)[2]), WIDE),
    "slice": (lambda m, x: functional.linear(x, m.w[16:48]), WIDE),
    "cat": (lambda m, x: functional.linear(x, torch.cat((m.w, m.v))), {**WIDE, "v": parameter(32, 64, seed=3)}),
    "scaled": (lambda m, x: functional.linear(x, m.w * 2), WIDE),
    "behind a transpose": (lambda m, x: x @ m.w.chunk(3)[1].t(), WIDE),
    "on the left": (lambda m, x: m.w.chunk(3)[1] @ x.transpose(-1, -2), WIDE),
    "one of a stack": (lambda m, x: x @ m.s[1], {"s": parameter(3, 64, 32)}),
    "weight norm": (lambda m, x: m.l(x), {"l": nn.utils.parametrizations.weight_norm(linear(32, 64))}),
}


@pytest.mark.parametrize("case", FOLDED)
def test_computed_weights_become_constants(case):
    function, members = FOLDED[case]
    model = Function(function, **members)
    graph_module = graph_of(model)
    before = len(graph_module.graph.nodes)
    assert FoldWeights()(graph_module).modified
    assert len(graph_module.graph.nodes) <= before
    assert any("_part" in name for name in names(graph_module))
    assert_metadata(graph_module, values(2, 3, 64))
    x = values(4, 5, 64)
    torch.testing.assert_close(run(graph_module, x), model(x))
    assert_unchanged(FoldWeights(), graph_module)
    q = lobcq_fx.quantize(model, example_inputs=x, config=lobcq_fx.LobcqConfig(mode="w4a16"))
    assert q.inventory.mac_coverage == 1
    assert (q(x) - model(x)).norm() < 0.2 * model(x).norm()


WHOLE = {
    "cast to its own dtype": lambda m, x: functional.linear(x, m.w.float()),
    "from end to end": lambda m, x: functional.linear(x, m.w[:96]),
    "behind a transpose": lambda m, x: x @ m.w.type(torch.float32).t(),
    "read otherwise too": lambda m, x: functional.linear(x * m.w[0], m.w.float()),
}
CAST = {
    "cast": lambda m, x: functional.linear(x.double(), m.w.double()),
    "cast behind a transpose": lambda m, x: x.double() @ m.w.double().t(),
    "cast twice": lambda m, x: functional.linear(x.double(), m.w.double()) + functional.linear(
        2 * x.double(), m.w.to(torch.float64)
    ),
    "read otherwise as it is cast": lambda m, x: functional.linear(x.double() * m.w.double()[0], m.w.double()),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE | CAST)
def test_a_whole_constant_keeps_its_name(case):
    """By which the model's class finds it; the model's own parameter is left alone."""
    model = Function((WHOLE | CAST)[case], **WIDE)
    graph_module = graph_of(model)
    assert FoldWeights()(graph_module).modified
    assert [name for name, _ in graph_module.named_parameters()] == ["w"]
    assert graph_module.w.dtype == (torch.float64 if case in CAST else torch.float32)
    assert model.w.dtype == torch.float32
    assert_metadata(graph_module, values(2, 3, 64))
    x = values(4, 5, 64)
    torch.testing.assert_close(run(graph_module, x), model(x))
    assert_unchanged(FoldWeights(), graph_module)


def test_a_constant_that_is_read_in_two_dtypes_is_there_in_both():
    def both(m, x):
        return functional.linear(x.double(), m.w.double()) + functional.linear(x, m.w)

    model = Function(both, **WIDE)
    graph_module = graph_of(model)
    assert FoldWeights()(graph_module).modified
    dtypes = {name: one.dtype for name, one in graph_module.named_parameters()}
    assert dtypes == {"w": torch.float32, "w_part": torch.float64}
    x = values(4, 5, 64)
    torch.testing.assert_close(run(graph_module, x), model(x))


class Counting(nn.Module):
    """Its weight is scaled by how often it was called."""

    def __init__(self):
        super().__init__()
        self.l = linear(64, 64)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x):
        self.calls.add_(1)
        return functional.linear(x, self.l.weight * self.calls)


KEPT = {
    "an input takes part": Function(lambda m, x: functional.linear(x, m.w * x.mean()), **WIDE),
    "random numbers take part": Function(lambda m, x: functional.linear(x, m.w * torch.rand_like(m.w)), **WIDE),
    "the graph writes to it": Counting(),
    "a constant already": Function(lambda m, x: functional.linear(x, m.w), **WIDE),
    "three dimensions": Function(lambda m, x: x @ (m.s * 2), s=parameter(2, 64, 32)),
    "no weight": Function(lambda m, x: x * (m.w[0] * 2), **WIDE),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_no_constant_stays(case):
    assert_unchanged(FoldWeights(), graph_of(KEPT[case]))


def test_one_weight_for_all_that_read_it():
    def both(m, x):
        part = m.w.chunk(3)[0]
        return functional.linear(x, part), functional.linear(2 * x, part)

    graph_module = graph_of(Function(both, **WIDE))
    assert FoldWeights()(graph_module).modified
    assert sum("_part" in name for name in names(graph_module)) == 1


class Cross(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True, **settings)

    def forward(self, x, memory, need_weights=False):
        return self.attention(x, memory, memory, need_weights=need_weights)[0]


@torch.no_grad()
def test_cross_attention_is_quantized_whole_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model, call = Cross().eval(), (values(2, 3, 64), values(2, 7, 64, seed=5))
    q = lobcq_fx.quantize(model, example_inputs=call)
    assert [record.layer for record in q.inventory.quantized] == [
        "attention.in_proj_weight_part", "attention.in_proj_weight_part_1", "attention.out_proj",
    ]  # fmt: skip
    assert not any(name == "attention.in_proj_weight" for name in q.state_dict())
    q.save_pretrained(tmp_path / "q")
    assert torch.equal(lobcq_fx.load(tmp_path / "q")(*call), q(*call))
    lobcq_fx.quantize(model, example_inputs=call, inplace=True)


@torch.no_grad()
def test_attention_to_keys_of_another_width_is_quantized_whole():
    torch.manual_seed(0)
    model, call = Cross(kdim=32, vdim=32).eval(), (values(2, 3, 64), values(2, 7, 32, seed=5), True)
    model.attention.in_proj_bias.normal_()  # zeros at first
    q = lobcq_fx.quantize(model, example_inputs=call, config=lobcq_fx.LobcqConfig(mode="w4a16"))
    names_ = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    layers = [record.layer for record in q.inventory.quantized]
    assert layers == [f"attention.{name.removesuffix('.weight')}" for name in names_]
    for name in names_:
        weight = model.attention.get_parameter(name)
        weight.copy_(decoded(weight))
    torch.testing.assert_close(q(*call), model(*call), rtol=1e-4, atol=1e-4)


BIASES = {
    "a part": (lambda m, x: functional.linear(x, m.w, m.b.chunk(2)[1]), {"b": parameter(192)}),
    "a part of both": (lambda m, x: torch.addmm(m.b[:48], x[0], m.w[:48].t()), {"b": parameter(96)}),
}


@pytest.mark.parametrize("case", BIASES)
def test_computed_biases_become_constants(case):
    """A kernel takes the bias of a layer that it has laid out as a constant."""
    function, members = BIASES[case]
    model = Function(function, **WIDE, **members)
    q = lobcq_fx.quantize(model, example_inputs=values(2, 3, 64), config=lobcq_fx.LobcqConfig(mode="w4a16"))
    assert "b_part" in q.state_dict()
    x = values(2, 5, 64)
    without = Function(function, **WIDE, b=nn.Parameter(torch.zeros_like(model.b)))
    difference = q(x) - lobcq_fx.quantize(without, example_inputs=x, config=q.lobcq_config)(x)
    torch.testing.assert_close(difference, model(x) - without(x), rtol=1e-4, atol=1e-4)
