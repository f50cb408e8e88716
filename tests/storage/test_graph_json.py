"""FX graphs as JSON: round trip of every argument kind, and files that try to be more than a graph."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import fx

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.bounds import SYMBOLIC
from lobcq_fx.storage.graph_json import graph_from_json, graph_to_json
from tests.passes.graphs import Function, linear, normalized, rewritten, run, values

aten = torch.ops.aten


def round_trip(graph):
    return graph_from_json(json.loads(json.dumps(graph_to_json(graph))))


def node(op="call_function", target="ops.aten.relu.default", args=(), kwargs=(), name="n"):
    return {
        "name": name,
        "op": op,
        "target": target,
        "args": {"tuple": list(args)},
        "kwargs": {"dict": [list(item) for item in kwargs]},
    }


INPUT = node("placeholder", "x", name="x")
X = {"node": "x"}

ARGUMENTS = [
    None, True, 3, -2.5, "text", math.inf, -math.inf, [1, [2]], (1, (2, "a")), {"a": (1,), "b": None},
    slice(None, 3, 2), torch.float8_e4m3fn, torch.bfloat16, torch.strided, torch.channels_last, torch.device("cpu"),
    torch.device("cuda:1"), torch.preserve_format,
]  # fmt: skip


@pytest.mark.parametrize("argument", ARGUMENTS, ids=repr)
def test_every_kind_of_argument(argument):
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_function(aten.relu.default, (x, argument, [x, argument]), {"key": argument})
    graph.output((call,))
    restored = round_trip(graph)
    assert [n.name for n in restored.nodes] == [n.name for n in graph.nodes]
    (again,) = (n for n in restored.nodes if n.op == "call_function")
    assert again.target is aten.relu.default
    assert again.args[1] == argument
    assert again.args[2][1] == argument
    assert again.kwargs == {"key": argument}
    assert repr(again.args) == repr(call.args)  # 1 and True, lists and tuples stay apart


def test_nan_stays_nan():
    graph = fx.Graph()
    graph.output((graph.call_function(aten.relu.default, (graph.placeholder("x"), math.nan)),))
    (again,) = (n for n in round_trip(graph).nodes if n.op == "call_function")
    assert math.isnan(again.args[1])


@torch.no_grad()
def test_a_rewritten_graph_runs_the_same():
    model = Function(lambda m, x: m.layer(x).view(x.shape[0] * x.shape[1], -1)[..., 1:] + 1, layer=linear(32, 64))
    graph_module = normalized(model)
    rewritten(graph_module)
    again = fx.GraphModule(graph_module, round_trip(graph_module.graph))
    assert again.code == graph_module.code
    for shape in ((2, 3, 64), (1, 1, 64), (4, 7, 64)):
        assert torch.equal(run(again, values(*shape)), run(graph_module, values(*shape)))


@pytest.mark.parametrize("name", sorted(SYMBOLIC))
def test_arithmetic_on_sizes(name):
    function, graph = SYMBOLIC[name], fx.Graph()
    size = graph.call_function(aten.sym_size.int, (graph.placeholder("x"), 0))
    graph.output((graph.call_function(function, (size, 2)),))
    assert function in [n.target for n in round_trip(graph).nodes]


TARGETS = [
    "os.system", "torch.load", "builtins.eval", "builtins.exec", "operator.attrgetter", "operator.methodcaller",
    "torch.ops.load_library", "ops.aten.from_file.default", "ops.aten.save.default", "ops.aten.__class__.default",
    "ops.mkldnn._linear_pointwise.default", "ops.aten.relu", "ops.aten.relu.nothing", "ops.aten.nothing.default",
    "ops..relu.default", "ops.aten.relu.default.redispatch", "ops.aten.relu.__init__", "ops.aten.relu.overloads",
    "", "ops", None, 3,
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_targets_outside_the_allowed_operators_are_refused(target):
    with pytest.raises(CheckpointError, match=r"graph\.json"):
        graph_from_json([INPUT, node(target=target, args=[X])])


@pytest.mark.parametrize("op", ["call_module", "call_method", "root", "", None])
def test_node_kinds_that_could_run_anything_are_refused(op):
    with pytest.raises(CheckpointError, match=r"the kind .* not allowed"):
        graph_from_json([INPUT, node(op, "x", args=[X])])


CODE = "__import__('pathlib').Path(PLACE).touch()"
# FX writes these texts into the source of `forward`: the first and the last would run without more ado.
INJECTIONS = {
    "default of an input": lambda code: [node("placeholder", f"y={code}", name="y")],
    "input that is a keyword": lambda code: [node("placeholder", "lambda", name="y")],
    "attribute": lambda code: [node("get_attr", f'w", {code}) or (x', name="w")],
    "attribute after a dot": lambda code: [node("get_attr", f'a."+{code}+"', name="w")],
    "attribute with a line break": lambda code: [node("get_attr", f"w\n{code}\nx", name="w")],
    "keyword": lambda code: [node(args=[X], kwargs=[(f"a={code}, b", 1)])],
}


@pytest.mark.parametrize("case", INJECTIONS)
def test_names_never_become_code(case, tmp_path):
    place = tmp_path / "touched"
    nodes = [
        INPUT,
        *INJECTIONS[case](CODE.replace("PLACE", repr(str(place)))),
        node("output", "output", [[X]], name="o"),
    ]
    with pytest.raises(CheckpointError, match=r"which is no (Python|attribute) name"):
        fx.GraphModule(torch.nn.Module(), graph_from_json(nodes))
    assert not place.exists()


def test_strings_among_the_arguments_stay_strings(tmp_path):
    place = tmp_path / "touched"
    text = f"'+{CODE.replace('PLACE', repr(str(place)))}+'\"\n"
    call = {**node(args=[X, text, {"dict": [[text, text]]}]), "name": text}  # FX replaces what no name may hold
    graph_module = fx.GraphModule(torch.nn.Module(), graph_from_json([INPUT, call]))
    assert "touch" in graph_module.code
    with pytest.raises(RuntimeError, match="relu"):
        graph_module(values(2))
    assert not place.exists()


@pytest.mark.parametrize("name", ["layers.0.weight", "lobcq.codebooks_1", "en-de.w", "x"])
def test_attribute_names_that_models_have_are_allowed(name):
    (one,) = graph_from_json([node("get_attr", name)]).nodes
    assert one.target == name


MALFORMED = {
    "unknown argument kind": [INPUT, node(args=[{"lambda": "1"}])],
    "two kinds at once": [INPUT, node(args=[{"node": "x", "tuple": []}])],
    "no kind": [INPUT, node(args=[{}])],
    "unknown node": [INPUT, node(args=[{"node": "y"}])],
    "used before defined": [node(args=[X]), INPUT],
    "no dtype": [INPUT, node(args=[X, {"dtype": "load"}])],
    "dtype of another kind": [INPUT, node(args=[X, {"dtype": "nothing"}])],
    "no device": [INPUT, node(args=[X, {"device": "toaster:1"}])],
    "no number": [INPUT, node(args=[X, {"float": "many"}])],
    "wrong slice": [INPUT, node(args=[X, {"slice": [1, 2, 3, 4]}])],
    "missing field": [{"name": "x", "op": "placeholder"}],
    "no node": ["placeholder"],
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_graphs_are_checkpoint_errors(case):
    with pytest.raises(CheckpointError, match=r"graph\.json"):
        graph_from_json(MALFORMED[case])


def calling(*call):
    graph = fx.Graph()
    graph.call_function(*call)
    return graph


def test_what_cannot_be_written_is_refused_when_saving():
    with pytest.raises(CheckpointError, match="cannot save node 'print_1'"):
        graph_to_json(calling(print, ()))
    with pytest.raises(CheckpointError, match="cannot save an argument of type complex"):
        graph_to_json(calling(aten.relu.default, (1j,)))
