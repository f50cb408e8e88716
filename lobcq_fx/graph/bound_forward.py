"""A graph module's `forward` with its tensors looked up beforehand.

Generated code asks for `self.model.layers.7.self_attn.q_proj.weight` at every call, and each dot costs a module's
`__getattr__`: of some hundred tensors more than the kernels of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx

from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.graph.graph_module import ensure_code


class BoundForward:
    """Calls what the graph module's code is now, on the tensors that it has now: for the time until one is replaced.

    What is written to the tensors shows. Hooks of the graph module are not called: with some, call the module itself.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        ensure_code(graph_module)
        self.forward = _forward_of(graph_module)
        self._self = SimpleNamespace()
        for node in graph_module.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                _put(self._self, str(node.target), get_attribute(graph_module, str(node.target)))

    def serves(self, graph_module: fx.GraphModule) -> bool:
        """Whether the graph module still has the code that this one calls."""
        return self.forward is _forward_of(graph_module)

    def __call__(self, *inputs: Tensor) -> Sequence[Any]:
        """What the graph module returns."""
        outputs: Sequence[Any] = self.forward(self._self, *inputs)
        return outputs


def _forward_of(graph_module: fx.GraphModule) -> Callable[..., Any]:
    forward: Callable[..., Any] = type(graph_module).forward
    return forward


def _put(root: SimpleNamespace, name: str, value: Any) -> None:
    """Let a dotted name lead to a value."""
    *path, last = name.split(".")
    for part in path:
        if part not in root.__dict__:
            root.__dict__[part] = SimpleNamespace()
        root = root.__dict__[part]
    root.__dict__[last] = value
