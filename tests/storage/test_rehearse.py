"""A graph of a file runs on tensors without memory as it is loaded: what does not fit is named then, not in a call."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.graph_json import graph_from_json
from lobcq_fx.storage.rehearse import rehearse
from tests.families import quantized_causal_lm
from tests.passes.graphs import values
from tests.storage.reindex import reindex
from tests.storage.test_crafted import INPUT, X, call, node

OUTPUT = node("output", "output", [{"node": "n"}], name="output")
EXAMPLE = {"dtype": "float32", "shape": [2, 8], "dynamic": [0]}


def rehearsed(*calls, example=EXAMPLE, **tensors):
    attributes = [node("get_attr", name, name=name) for name in tensors]
    rehearse([graph_from_json([{**INPUT, "example": example}, *attributes, *calls, OUTPUT])], tensors)


SIZE = call("ops.aten.sym_size.int", X, 0, name="size")
MISFITS = {
    "other sizes": [call("ops.aten.add.Tensor", X, {"node": "w"})],
    "other arguments": [call("ops.aten.add.Tensor", X)],
    "list for a number": [call("ops.aten.sum.dim_IntList", X, [["a"]])],
    "attention of other widths": [call("ops.aten.scaled_dot_product_attention.default", X, {"node": "w"}, X)],
    "no such dimension": [call("ops.aten.sym_size.int", X, 9)],
    "keyword": [call("ops.aten.relu.default", X, inplace=True)],
    "no such result": [call("ops.aten.topk.default", X, 1, name="m"), call("operator.getitem", {"node": "m"}, 5)],
    "division by zero": [SIZE, call("operator.floordiv", {"node": "size"}, 0)],
    "absurd size": [call("ops.aten.full.default", [2**20, 2**20], 1.0)],
    "absurd size of a size": [SIZE, call("ops.aten.full.default", [{"node": "size"}, 2**40], 1.0)],
    "absurd range": [call("ops.aten.arange.default", 2**40)],
    "absurd copy": [call("ops.aten.repeat.default", X, [2**30, 1])],
    "size beyond all": [call("ops.aten.full.default", [2**62, 2**62], 1.0)],
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named(case):
    with pytest.raises(CheckpointError, match=r"graph\.json: node '\w+' (does not take its operands|makes a)"):
        rehearsed(*MISFITS[case], w=values(3, 5))


def test_what_fits_is_taken():
    rehearsed(call("ops.aten.matmul.default", X, {"node": "w"}, name="n"), w=values(8, 5))
    rehearsed(call("ops.aten.full.default", [2, 3], 1.0, device={"device": "cpu"}))


def test_sizes_that_follow_from_values_are_left_to_the_call():
    mask = call("ops.aten.gt.Scalar", X, 0, name="m")
    rehearsed(mask, call("ops.aten.index.Tensor", X, [{"node": "m"}]))


def test_equal_layers_are_run_once(monkeypatch):
    count = []
    relu = torch.ops.aten.relu.default
    monkeypatch.setattr(type(relu), "__call__", lambda self, *args: count.append(self) or torch.empty_like(args[0]))
    names = ["x", "a", "b", "c", "n"]
    rehearsed(*(call("ops.aten.relu.default", {"node": one}, name=name) for one, name in pairwise(names)))
    assert count == [relu, relu]  # on the input, and on what looks like a result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "q"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 16)).eval()
    lobcq_fx.quantize(model, example_inputs=values(2, 64)).save_pretrained(folder)
    return folder


def of(target):
    return lambda graph: next(entry for entry in graph["nodes"] if entry["target"] == target)


def input_of(graph):
    return next(entry for entry in graph["nodes"] if entry["op"] == "placeholder")


def narrower(graph):
    input_of(graph)["example"]["shape"][-1] = 65


def other_activation(graph):
    linears = [entry for entry in graph["nodes"] if entry["target"] == "ops.lobcq.linear.default"]
    linears[1]["args"]["tuple"][0] = linears[0]["args"]["tuple"][0]


def computed_codebooks(graph):
    encoder = of("ops.lobcq.quantize_activation.default")(graph)
    encoder["args"]["tuple"][1] = encoder["args"]["tuple"][0]


def no_output(graph):
    graph["nodes"][-1]["args"]["tuple"][0]["tuple"].clear()


def second_input(graph):
    graph["nodes"].insert(0, {**node("placeholder", "y", name="y"), "example": EXAMPLE})


DAMAGES = {
    "input of another width": (narrower, "multiplies a torch.float32 of|does not take its operands"),
    "activation of another linear": (other_activation, "reads no activation as it was encoded for it"),
    "codebooks that are computed": (computed_codebooks, "is no stored tensor"),
    "no output": (no_output, r"has 1 inputs and 0 outputs; it is called for 1 and 1"),
    "second input": (second_input, r"has 2 inputs and 1 outputs; it is called for 1 and 1"),
    "input called self": (lambda graph: input_of(graph).update(target="self"), "'self', which FX has a use for"),
    "shapes": (lambda graph: graph["calling"]["shapes"].append([1]), "2 shapes for 1 tensors"),
    "names": (lambda graph: graph["calling"].update(names=[1]), "not called by name"),
    "constant": (lambda graph: graph["calling"].update(constants={"7": 1}), "a constant in the place of no argument"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_shows_as_the_folder_is_loaded(case, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "q")
    damage, message = DAMAGES[case]
    graph = json.loads((tmp_path / "q" / "graph.json").read_text())
    damage(graph)
    (tmp_path / "q" / "graph.json").write_text(json.dumps(graph))
    reindex(tmp_path / "q")
    with pytest.raises(CheckpointError, match=message):
        lobcq_fx.load(tmp_path / "q")


def test_both_graphs_of_a_language_model_are_rehearsed(tmp_path):
    quantized_causal_lm("llama")[1].save_pretrained(tmp_path)
    graph = json.loads((tmp_path / "graph.json").read_text())
    nodes = graph["variants"]["static_cache"]["nodes"]
    next(entry for entry in nodes if entry["target"] == "ops.aten.view.default")["args"]["tuple"][1] = [1, 7]
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    reindex(tmp_path)
    with pytest.raises(CheckpointError, match=r"node '\w+' does not take its operands"):
        lobcq_fx.load(tmp_path)
