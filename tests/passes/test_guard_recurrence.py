"""guard_recurrence: what torch's recurrent kernels trust is checked, in graphs of files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.errors import CheckpointError
from lobcq_fx.passes.guard_recurrence import GuardRecurrence
from tests.passes.graphs import assert_unchanged, values
from tests.storage.reindex import reindex

aten = torch.ops.aten
X = values(3, 5, 64)


class Recurrent(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.layers = kind(64, 32, num_layers=2, **settings)
        self.head = nn.Linear(64 if self.layers.bidirectional else 32, 64)

    def forward(self, x):
        out, last = self.layers(x)
        return self.head(out), last


KINDS = {
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm both ways": (nn.LSTM, {"bidirectional": True}),
    "gru": (nn.GRU, {"batch_first": True, "bidirectional": True}),
    "gru without biases": (nn.GRU, {"bias": False}),
    "rnn": (nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    kind, settings = KINDS[request.param]
    q = lobcq_fx.quantize(Recurrent(kind, **settings).eval(), example_inputs=X)
    q.save_pretrained(tmp_path / "q")
    return q, tmp_path / "q", "batch_first" in settings


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_what_was_saved_computes_the_same(saved):
    q, folder, batch_first = saved
    loaded = lobcq_fx.load(folder)
    assert_unchanged(GuardRecurrence(), loaded.graph_module)  # it is there
    assert any(node.target is aten.reshape.default for node in loaded.graph_module.graph.nodes)
    for x in (X, values(2, 5, 64) if batch_first else values(3, 7, 64)):  # tracing fixes the number of steps
        found, expected = (torch.utils._pytree.tree_leaves(model(x)) for model in (loaded, q))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_cell_of_another_batch_is_an_error(tmp_path, batch):
    """As a file may make it; torch would write beyond it."""
    folder = crafted(tmp_path, lambda nodes: give_the_cell(nodes, batch))
    with pytest.raises((CheckpointError, RuntimeError), match=r"shape|size"):
        lobcq_fx.load(folder)(X)


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
@pytest.mark.parametrize("place", [0, 1, 2, 5])
def test_parameters_that_do_not_fit_are_refused(tmp_path, place):
    def another_in_its_place(nodes):
        (lstm,) = (node for node in nodes if node["target"] == "ops.aten.lstm.input")
        parameters = lstm["args"]["tuple"][2]
        parameters[place] = parameters[1 if place == 2 else 2]

    with pytest.raises(CheckpointError, match=r"layers\..* is torch\.float32 .* needs"):
        lobcq_fx.load(crafted(tmp_path, another_in_its_place))


def give_the_cell(nodes, batch):
    _, cell = (node for node in nodes if node["target"] == "ops.aten.zeros.default")
    cell["args"]["tuple"][0][1] = batch


def crafted(tmp_path, change):
    q = lobcq_fx.quantize(Recurrent(nn.LSTM, batch_first=True).eval(), example_inputs=X)
    folder = tmp_path / "q"
    q.save_pretrained(folder)
    graph = json.loads((folder / "graph.json").read_text())
    change(graph["nodes"])
    (folder / "graph.json").write_text(json.dumps(graph))
    reindex(folder)
    return folder
