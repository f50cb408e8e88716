"""Graph modules whose generated source goes when they go, and copies of graphs."""

from __future__ import annotations

import linecache
import weakref
from typing import Any, ClassVar

from torch import fx
from torch.fx.graph import PythonCode
from torch.fx.graph_module import _loader


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes, and their metadata."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


class LobcqGraphModule(fx.GraphModule):
    """What FX makes of a graph, without what it keeps: the source of every `forward` it ever made, for tracebacks.

    Each instance has a class of its own, as FX makes them, which remembers what to forget.
    """

    _lobcq_source: ClassVar[weakref.finalize | None] = None  # type: ignore[type-arg]

    @property
    def code(self) -> str:
        """The source of `forward`."""
        ensure_code(self)
        return super().code

    def recompile(self) -> PythonCode:
        """Generate `forward` anew; the source of the one before is forgotten."""
        code = super().recompile()
        own = type(self)
        if own._lobcq_source is not None:
            own._lobcq_source()
        own._lobcq_source = weakref.finalize(self, _forget, own.forward.__code__.co_filename)
        own._lobcq_source.atexit = False
        return code


def hold(graph_module: fx.GraphModule, graph: fx.Graph) -> None:
    """Give a graph module a graph that passes are going to change, or that another will replace.

    To generate code takes longer than most passes: it is done by the first call, or before that by `ensure_code`.
    """
    graph_module._graph = graph
    graph.owning_module = graph_module
    type(graph_module).forward = _generate_and_run


def ensure_code(graph_module: fx.GraphModule) -> None:
    """Generate the code of a graph that was given to `hold` and not changed since by passes, which do so."""
    if type(graph_module).forward is _generate_and_run:
        graph_module.recompile()


def _generate_and_run(graph_module: fx.GraphModule, *inputs: Any) -> Any:
    """The `forward` of a graph that has no code yet."""
    ensure_code(graph_module)
    return graph_module.forward(*inputs)


def _forget(source: str) -> None:
    _loader.eval_cache.pop(source, None)
    linecache.cache.pop(source, None)
