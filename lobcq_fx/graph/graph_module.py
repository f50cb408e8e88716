"""Graph modules whose generated source goes when they go, and copies of graphs."""

from __future__ import annotations

import linecache
import weakref
from typing import ClassVar

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

    def recompile(self) -> PythonCode:
        """Generate `forward` anew; the source of the one before is forgotten."""
        code = super().recompile()
        own = type(self)
        if own._lobcq_source is not None:
            own._lobcq_source()
        own._lobcq_source = weakref.finalize(self, _forget, own.forward.__code__.co_filename)
        own._lobcq_source.atexit = False
        return code


def _forget(source: str) -> None:
    _loader.eval_cache.pop(source, None)
    linecache.cache.pop(source, None)
