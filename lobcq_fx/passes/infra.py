"""What a pass is: a frozen dataclass of options, called with a graph module, that says honestly what it changed."""

from __future__ import annotations

import os
import sys
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lobcq_fx.refusal import Refusal

Condition = Callable[[fx.GraphModule], str | None]
"""What a graph must be like: called with a graph module, says what is not as required, or None."""

PRINT_AFTER = "LOBCQ_PRINT_AFTER"
"""Environment variable: name of the pass after which graphs are printed to stderr, or "all"."""


@dataclass(frozen=True)
class PassResult:
    """The graph module after a pass (the same object, changed in place), whether anything changed, and what did not.

    refusals: what the pass looked at and left as it was, with the reason.
    """

    graph_module: fx.GraphModule
    modified: bool
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class GraphPass(ABC):
    """One transformation of an FX graph; a second run must report no change.

    Subclasses implement `transform`, or `attempt` where they refuse something and say why.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[Condition, ...]] = ()

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass, check the graph and regenerate its code if it changed; raises as `run`."""
        result = self.run(graph_module)
        if result.modified:
            graph_module.recompile()
        return result

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass and check the graph, whose code stays as it was: generating it takes longer than most passes.

        Raises:
            RuntimeError: the graph is not what the pass requires, or malformed afterwards (a bug in the list of passes,
                or in the pass).
        """
        for condition in self.requires:
            missing = condition(graph_module)
            if missing is not None:
                raise RuntimeError(f"pass {self.name!r} cannot run: {missing}")
        with torch.no_grad():
            modified, refusals = self.attempt(graph_module)
        if modified:
            graph_module.graph.lint()
        if os.environ.get(PRINT_AFTER) in (self.name, "all"):
            sys.stderr.write(
                f"# after {self.name}, modified: {modified}\n{graph_module.graph.python_code('self').src}\n"
            )
        return PassResult(graph_module, modified, tuple(refusals))

    def attempt(self, graph_module: fx.GraphModule) -> tuple[bool, list[Refusal]]:
        """Change the graph in place; return whether anything changed, and what was refused."""
        return self.transform(graph_module), []

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Change the graph in place; return whether anything changed. For passes that refuse nothing."""
        raise NotImplementedError(f"pass {self.name!r} has neither `transform` nor `attempt`")


@dataclass(frozen=True)
class Sequential(GraphPass):
    """Passes in order, as one pass."""

    name: ClassVar[str] = "sequential"

    passes: tuple[GraphPass, ...]

    def attempt(self, graph_module: fx.GraphModule) -> tuple[bool, list[Refusal]]:
        """Run every pass; report whether any of them changed the graph, and what each refused."""
        results = [one.run(graph_module) for one in self.passes]
        return any(result.modified for result in results), [refusal for one in results for refusal in one.refusals]
