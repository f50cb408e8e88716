"""Graph modules leave nothing behind: FX would keep the source of each."""

from __future__ import annotations

import copy
import gc
import inspect
import linecache

import torch
from torch import fx, nn
from torch.fx.graph_module import _loader

import lobcq_fx
from lobcq_fx.graph.graph_module import LobcqGraphModule
from tests.passes.graphs import values


def doubling():
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (graph.placeholder("x"),) * 2))
    return LobcqGraphModule(nn.Module(), graph)


def sources():
    gc.collect()
    return set(_loader.eval_cache)


def test_source_is_there_as_long_as_the_module():
    before = sources()
    one = doubling()
    assert "aten.add.Tensor" in inspect.getsource(one.forward)
    other = copy.deepcopy(one)
    assert len(sources() - before) == 2
    del one
    assert "aten.add.Tensor" in inspect.getsource(other.forward)
    for _ in range(3):
        other.recompile()
    assert len(sources() - before) == 1
    assert other(torch.ones(())) == 2
    del other
    assert sources() == before


def test_loading_again_and_again_keeps_nothing(tmp_path):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).eval()
    lobcq_fx.quantize(model, example_inputs=values(2, 64)).save_pretrained(tmp_path / "q")
    kept = []
    for _ in range(4):
        lobcq_fx.load(tmp_path / "q")
        kept.append((sources(), len(linecache.cache)))
    assert kept[1:] == kept[:-1]
