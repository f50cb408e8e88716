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
from lobcq_fx.graph.bound_forward import BoundForward
from lobcq_fx.graph.graph_module import LobcqGraphModule, ensure_code, hold
from tests.passes.graphs import values


def doubling():
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (graph.placeholder("x"),) * 2))
    return LobcqGraphModule(nn.Module(), graph)


def sources():
    gc.collect()
    return set(_loader.eval_cache)


def tripling():
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("x"), 3)))
    return graph


def test_the_code_of_a_held_graph_is_generated_once_and_when_it_is_needed(monkeypatch):
    generated = []
    recompile = LobcqGraphModule.recompile
    monkeypatch.setattr(LobcqGraphModule, "recompile", lambda self: generated.append(self) or recompile(self))
    for needs in (lambda one: one(torch.ones(())), lambda one: BoundForward(one)(torch.ones(()))):
        one = doubling()
        generated.clear()
        hold(one, tripling())
        assert not generated
        assert needs(one) == needs(one) == 3
        assert generated == [one]
        ensure_code(one)
        assert generated == [one]
    hold(one, tripling())
    assert "mul.Tensor" in one.code
    assert generated == [one, one]


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


def test_loading_generates_the_code_of_every_graph_once(tmp_path, monkeypatch):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).eval()
    lobcq_fx.quantize(model, example_inputs=values(2, 64)).save_pretrained(tmp_path / "q")
    lengths = []
    recompile = LobcqGraphModule.recompile
    monkeypatch.setattr(
        LobcqGraphModule, "recompile", lambda self: lengths.append(len(self.graph.nodes)) or recompile(self)
    )
    q = lobcq_fx.load(tmp_path / "q")
    assert [length for length in lengths if length] == [len(q.graph_module.graph.nodes)]
    q(values(2, 64))
    assert len([length for length in lengths if length]) == 1


def test_loading_again_and_again_keeps_nothing(tmp_path):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).eval()
    lobcq_fx.quantize(model, example_inputs=values(2, 64)).save_pretrained(tmp_path / "q")
    kept = []
    for _ in range(4):
        lobcq_fx.load(tmp_path / "q")
        kept.append((sources(), len(linecache.cache)))
    assert kept[1:] == kept[:-1]
