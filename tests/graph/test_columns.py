"""Which operators leave the columns of an activation as they are, each times a number for each row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lobcq_fx.graph.columns import same_columns, with_these_columns
from tests.passes.graphs import Function, aten, linear, normalized, values

SCALE = torch.exp2(torch.arange(16) % 5 - 2.0)
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "rows as a matrix": lambda x: x.view(-1, 16),
    "rows in another shape": lambda x: x.reshape(-1, 2, 16),
    "rows of it": lambda x: x[torch.tensor([2, 0, 0])],
    "rows of rows": lambda x: aten.index.Tensor(x, [None, torch.tensor([3, 1])]),
    "several times": lambda x: x.repeat(2, 1, 1),
    "a number for each row": lambda x: x * torch.full_like(x[..., :1], 3),
    "cast": lambda x: x.to(torch.bfloat16),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "columns in other places": lambda x: aten.index.Tensor(x, [None, None, torch.arange(16).flip(0)]),
    "columns as rows": lambda x: x.reshape(-1, 8),
    "columns several times": lambda x: x.repeat(1, 1, 2),
    "a number for each column": lambda x: x * torch.arange(16.0),
    "a sum": lambda x: x + 1,
    "as integers": lambda x: x.to(torch.int64),
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_operators(name: str) -> None:
    function = {**SAME, **OTHER}[name]
    graph_module = normalized(Function(lambda m, x: function(m.linear(x)), linear=linear(16, 8)), values(6, 4, 8))
    (x,) = graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)
    (output,) = graph_module.graph.find_nodes(op="output")
    result = output.args[0][0]
    assert result is not x
    assert (same_columns(result) is x) == (name in SAME)
    assert list(with_these_columns(result)) == ([result, x] if name in SAME else [result])
    if name in SAME:  # which is what they are for
        rows = values(6, 4, 16)
        assert torch.equal(function(rows / SCALE) * SCALE, function(rows))
