"""normalize_matmuls: addmm, mm, matmul and transposed weights become linear; near misses stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lobcq_fx.graph.matmuls import find_matmuls
from lobcq_fx.graph.operands import constant_weight, operation_name
from lobcq_fx.passes.infra import PassResult
from lobcq_fx.passes.normalize_matmuls import NormalizeMatmuls
from tests.passes.graphs import (
    Function,
    assert_metadata,
    assert_unchanged,
    aten,
    graph_of,
    nodes,
    parameter,
    run,
    targets,
    values,
)  # fmt: skip

W = {"w": parameter(64, 32)}  # [K, N]
B = {**W, "b": parameter(32, seed=2)}
WIDE = {"w": parameter(32, 64)}  # [N, K]

FORMS = {
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), B, aten.addmm.default, 1),
    "mm": (lambda m, x: torch.mm(x, m.w), W, aten.mm.default, 1),
    "matmul": (lambda m, x: x @ m.w, W, aten.matmul.default, 1),
    "matmul by t()": (lambda m, x: x @ m.w.t(), WIDE, aten.matmul.default, 0),
    "matmul by .T": (lambda m, x: x @ m.w.T, WIDE, aten.matmul.default, 0),
    "matmul by transpose(-1, 0)": (lambda m, x: x @ m.w.transpose(-1, 0), WIDE, aten.matmul.default, 0),
    "matmul by permute(1, 0)": (lambda m, x: x @ m.w.permute(1, 0), WIDE, aten.matmul.default, 0),
    "linear by t().t()": (lambda m, x: nn.functional.linear(x, m.w.t().t()), WIDE, aten.linear.default, 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_linear_with_at_most_one_transpose(form):
    function, members, before, transposes = FORMS[form]
    model = Function(function, **members)
    graph_module = graph_of(model, values(4, 64))
    assert before in targets(graph_module)

    result = NormalizeMatmuls()(graph_module)
    assert result == PassResult(graph_module, True)
    (node,) = nodes(graph_module, aten.linear.default)
    assert before is aten.linear.default or before not in targets(graph_module)
    weight, flipped = constant_weight(node.args[1])
    assert (weight.target, flipped) == ("w", bool(transposes))
    assert node.args[1].target == (aten.t.default if transposes else "w")
    assert operation_name(node) == form.split(" ")[0]

    assert_metadata(graph_module, values(5, 64))
    for rows in (1, 5):
        x = values(rows, 64)
        torch.testing.assert_close(run(graph_module, x), model(x))
    assert_unchanged(NormalizeMatmuls(), graph_module)


@pytest.mark.parametrize("shape", [(2, 3, 64), (2, 3, 4, 64)])
def test_matmul_keeps_leading_dimensions(shape):
    model = Function(lambda m, x: x @ m.w, **W)
    graph_module = graph_of(model, values(*shape))
    assert NormalizeMatmuls()(graph_module).modified
    assert_metadata(graph_module, values(*shape))
    one = values(*[1] * (len(shape) - 1), 64)
    torch.testing.assert_close(run(graph_module, one), model(one))


LEFT = {
    "matmul of columns": (lambda m, x: m.w @ x.transpose(-1, -2), aten.matmul.default, (2, 3, 64)),
    "mm of columns": (lambda m, x: torch.mm(m.w, x.t()), aten.mm.default, (4, 64)),
    "matmul of a vector": (lambda m, x: m.w @ x, aten.matmul.default, (64,)),
    "mv": (lambda m, x: torch.mv(m.w, x), aten.mv.default, (64,)),
}


@pytest.mark.parametrize("form", LEFT)
def test_a_weight_on_the_left_becomes_linear_too(form):
    function, before, shape = LEFT[form]
    model = Function(function, **WIDE)
    graph_module = graph_of(model, values(*shape))
    assert before in targets(graph_module)
    assert NormalizeMatmuls()(graph_module).modified
    (node,) = nodes(graph_module, aten.linear.default)
    assert constant_weight(node.args[1])[0].target == "w"
    assert_metadata(graph_module, values(*shape))
    x = values(*[5] * (len(shape) - 1), 64)
    torch.testing.assert_close(run(graph_module, x), model(x))
    assert_unchanged(NormalizeMatmuls(), graph_module)


def test_a_plain_linear_is_normal_already():
    graph_module = graph_of(nn.Linear(64, 32), values(4, 64))
    assert targets(graph_module) == [aten.linear.default]
    assert_unchanged(NormalizeMatmuls(), graph_module)


def test_one_transpose_serves_all_and_is_moved_before_the_first():
    model = Function(lambda m, x: (x @ m.w) @ m.w.t() @ m.w, w=parameter(64, 64))
    graph_module = graph_of(model, values(4, 64))
    assert targets(graph_module).count(aten.matmul.default) == 3
    NormalizeMatmuls()(graph_module)
    assert [constant_weight(n.args[1])[1] for n in nodes(graph_module, aten.linear.default)] == [True, False, True]
    assert len(nodes(graph_module, aten.t.default)) == 1
    x = values(4, 64)
    torch.testing.assert_close(run(graph_module, x), model(x))


def test_a_stack_with_something_added_is_a_grouped_product():
    members = {"w": parameter(4, 64, 32), "b": parameter(4, 1, 32)}
    model = Function(lambda m, x: torch.baddbmm(m.b, x.view(4, -1, 64), m.w), **members)
    graph_module = graph_of(model, values(4, 3, 64))
    assert aten.baddbmm.default in targets(graph_module)
    assert NormalizeMatmuls()(graph_module).modified
    (matmul,) = find_matmuls(graph_module)
    assert (matmul.grouped, matmul.obstacle, matmul.shape) == (True, None, (4, 32, 64))
    assert operation_name(matmul.node) == "baddbmm"
    assert_metadata(graph_module, values(4, 3, 64))
    torch.testing.assert_close(run(graph_module, values(4, 5, 64)), model(values(4, 5, 64)))
    assert_unchanged(NormalizeMatmuls(), graph_module)


@pytest.mark.parametrize("tokens", [4, 9])
def test_token_mixing_is_copied_where_a_view_needs_it(tokens):
    """The product of columns lies otherwise than that which it replaces."""
    model = Function(lambda m, x: (m.w @ x).relu().view(x.shape[0], -1), **WIDE)
    graph_module = graph_of(model, values(2, 64, 5))
    NormalizeMatmuls()(graph_module)
    assert targets(graph_module).count(aten.contiguous.default) == 1
    x = values(3, 64, tokens)
    torch.testing.assert_close(run(graph_module, x), model(x))
    assert_metadata(graph_module, x)


NEAR_MISSES = {
    "baddbmm with a factor": (
        lambda m, x: torch.baddbmm(m.b, x[None], m.w, beta=2),
        {"w": parameter(1, 64, 32), "b": parameter(32)},
        aten.baddbmm.default,
    ),
    "beta": (lambda m, x: torch.addmm(m.b, x, m.w, beta=2), B, aten.addmm.default),
    "alpha": (lambda m, x: torch.addmm(m.b, x, m.w, alpha=0.5), B, aten.addmm.default),
    "2-D bias": (lambda m, x: torch.addmm(m.b, x, m.w), {**W, "b": parameter(4, 32)}, aten.addmm.default),
    "3-D weight": (lambda m, x: x[None] @ m.w, {"w": parameter(2, 64, 32)}, aten.matmul.default),
    "activation x activation": (lambda m, x: x @ x.t(), {}, aten.matmul.default),
    "3-D weight on the left": (lambda m, x: m.w @ x.t(), {"w": parameter(2, 32, 64)}, aten.matmul.default),
    "weight x weight": (lambda m, x: x + (m.w @ m.w).sum(), {"w": parameter(64, 64)}, aten.matmul.default),
    "weight computed in the graph": (lambda m, x: x @ (m.w * 2), W, aten.matmul.default),
    "vector": (lambda m, x: x @ m.w, {"w": parameter(64)}, aten.matmul.default),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_stay_as_they_are(case):
    function, members, target = NEAR_MISSES[case]
    graph_module = graph_of(Function(function, **members), values(4, 64))
    assert target in targets(graph_module)
    assert_unchanged(NormalizeMatmuls(), graph_module)
    assert target in targets(graph_module)
