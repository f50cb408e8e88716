"""Which sizes may be 1 in a graph that was traced with the assumption that they are at least 2.

Such a trace goes the general way, which nearly always holds for 1 too. It does not where an operator compared a size
with 2 while it was traced: `x[:, -2:]` has 2 columns then, of however many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode


def wrong_at_one(graph_module: fx.GraphModule, hints: Mapping[sympy.Symbol, int]) -> frozenset[sympy.Symbol]:
    """The symbols for which the graph's metadata does not hold where they are 1, alone or all together.

    Args:
        graph_module: as it was traced, with metadata.
        hints: each symbol's value in the example.
    """
    wrong = {symbol for symbol in hints if not _holds(graph_module, {**hints, symbol: 1})}
    if not _holds(graph_module, {**hints, **{symbol: 1 for symbol in hints if symbol not in wrong}}):
        return frozenset(hints)
    return frozenset(wrong)


@torch.no_grad()
def _holds(graph_module: fx.GraphModule, values: Mapping[sympy.Symbol, int]) -> bool:
    """Whether the operators make what the metadata says, of inputs of these sizes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [_example(node.meta["val"], values) for node in graph_module.graph.find_nodes(op="placeholder")]
        try:
            _Checked(graph_module, values).run(*inputs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True  # it depends on values from here on, which the metadata says nothing of
        except (RuntimeError, IndexError, ValueError, _OtherSizeError):
            return False
    return True


class _OtherSizeError(Exception):
    """An operator's result is not of the size that the metadata has."""


class _Checked(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, values: Mapping[sympy.Symbol, int]) -> None:
        super().__init__(graph_module)
        self.values = values

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        traced = n.meta.get("val")
        if isinstance(result, Tensor) and isinstance(traced, Tensor):
            expected = [_value(size, self.values) for size in traced.shape]
            if len(expected) != result.dim() or any(
                size not in (None, actual) for size, actual in zip(expected, result.shape, strict=True)
            ):
                raise _OtherSizeError(n.name)
        return result


def _example(traced: Any, values: Mapping[sympy.Symbol, int]) -> Any:
    if not isinstance(traced, Tensor):
        return traced
    shape = [_value(size, values) for size in traced.shape]
    return torch.empty([2 if size is None else size for size in shape], dtype=traced.dtype, device=traced.device)


def _value(size: int | torch.SymInt, values: Mapping[sympy.Symbol, int]) -> int | None:
    """A size for these values of its symbols; None where it depends on something else."""
    if isinstance(size, int):
        return size
    expression = size.node.shape_env.replace(size.node.expr).subs(values)
    return int(expression) if isinstance(expression, sympy.Integer) else None
