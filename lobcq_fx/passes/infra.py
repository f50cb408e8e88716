"""What a pass is: a frozen dataclass of options, called with a graph module, that says honestly what it changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx


@dataclass(frozen=True)
class PassResult:
    """The graph module after a pass (the same object, changed in place) and whether anything changed."""

    graph_module: fx.GraphModule
    modified: bool


@dataclass(frozen=True)
class GraphPass(ABC):
    """One transformation of an FX graph. Subclasses implement `transform`; a second run must report no change."""

    name: ClassVar[str]

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass, check the graph and regenerate its code if it changed.

        Raises:
            RuntimeError: the transformed graph is malformed (a bug in the pass).
        """
        with torch.no_grad():
            modified = self.transform(graph_module)
        if modified:
            graph_module.graph.lint()
            graph_module.recompile()
        return PassResult(graph_module, modified)

    @abstractmethod
    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Change the graph in place; return whether anything changed."""


@dataclass(frozen=True)
class Sequential(GraphPass):
    """Passes in order, as one pass."""

    name: ClassVar[str] = "sequential"

    passes: tuple[GraphPass, ...]

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Run every pass; report whether any of them changed the graph."""
        results = [one(graph_module).modified for one in self.passes]
        return any(results)
