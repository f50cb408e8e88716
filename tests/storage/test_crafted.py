"""Graphs that somebody has written by hand, to do more than compute: each is refused before anything of it runs.

All of this holds under `python -O` as well, where an assertion is no check.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.graph_json import graph_from_json
from lobcq_fx.tracing.guards import SizeGuards

ROOT = Path(__file__).parents[2]


def node(op, target, *args, name, **kwargs):
    return {
        "name": name,
        "op": op,
        "target": target,
        "args": {"tuple": list(args)},
        "kwargs": {"dict": [list(item) for item in kwargs.items()]},
    }


def call(target, *args, name="n", **kwargs):
    return node("call_function", target, *args, name=name, **kwargs)


def nested(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


X, N = {"node": "x"}, {"node": "size"}
INPUT = node("placeholder", "x", name="x")
SIZE = call("ops.aten.sym_size.int", X, 0, name="size")
OTHER_INPUT = node("placeholder", "given", name="other")
OUTPUT = node("output", "output", [X], name="output")


def squared(times):
    names = ["size", *(f"n{i}" for i in range(times))]
    return [call("operator.mul", {"node": a}, {"node": a}, name=b) for a, b in pairwise(names)]


CRAFTED = {
    "not an operator": [call("ops.aten.relu.__init__", X)],
    "not an operator of the namespace": [call("ops.__init__.relu.default", X)],
    "attribute of the library": [call("ops.aten.__init__.default", X)],
    "power of a constant": [call("operator.pow", 2, 2**30)],
    "power of powers": [call("operator.pow", N, 64), *(call("operator.pow", {"node": "n"}, 64, name="m"),)],
    "power of a size": [call("operator.pow", N, N)],
    "squares of squares": squared(40),
    "shift": [call("operator.lshift", 1, 2**40)],
    "repeated list": [call("operator.mul", [X], 2**40)],
    "repeated text": [call("operator.mul", "text", 2**40)],
    "formatted text": [call("operator.mod", "%1000000000d", N)],
    "arithmetic on tensors": [call("operator.add", X, X)],
    "keyword for arithmetic": [call("operator.add", N, N, out=X)],
    "slice of a tensor": [call("operator.getitem", X, {"slice": [0, 1, 1]})],
    "item of a list": [call("operator.getitem", [X, X], 0)],
    "too large an integer": [call("ops.aten.add.Tensor", X, 2**70)],
    "huge integer": [call("ops.aten.add.Tensor", X, 10**4000)],
    "huge negative integer": [call("ops.aten.add.Tensor", X, -(2**64))],
    "nested too deep": [call("ops.aten.stack.default", nested(50))],
    "nested beyond the stack": [call("ops.aten.stack.default", nested(5000))],
    "long name": [call("ops.aten.relu.default", X, name="n" * 100_000)],
    "long text": [call("ops.aten.gelu.default", X, approximate="n" * 100_000)],
    "name that is no text": [call("ops.aten.relu.default", X, name=["n"])],
    "too many nodes": [OUTPUT] * 300_000,
    "pinned memory": [call("ops.aten.arange.default", N, device={"device": "cpu"}, pin_memory=1)],
    "input that another value replaces": [call("ops.aten.relu.default", X, name="given"), OTHER_INPUT],
    "two inputs of one name": [OTHER_INPUT, {**OTHER_INPUT, "name": "third"}],
}


@pytest.mark.parametrize("case", CRAFTED)
def test_is_refused(case):
    with pytest.raises(CheckpointError, match=r"graph\.json"):
        graph_from_json([INPUT, SIZE, *CRAFTED[case], OUTPUT])


def test_what_it_is_made_of_is_allowed():
    graph_from_json([INPUT, SIZE, call("operator.pow", N, 2), *squared(3), OUTPUT])


def deep_guard(levels):
    tree = 1
    for _ in range(levels):
        tree = ["+", tree, 1]
    return ["<", tree, ["size", 0, 0]]


@pytest.mark.parametrize(
    "tree",
    [deep_guard(200), deep_guard(100_000), ["<", 2**64, 1], ["<", 1, ["size"] * 6000]],
    ids=["200", "100000", "number", "parts"],
)
def test_guards_of_any_extent_are_refused(tree):
    with pytest.raises(ValueError, match="a size guard has"):
        SizeGuards.from_list([tree])


def test_all_of_it_is_refused_without_assertions_too():
    if sys.flags.optimize:
        return
    command = [
        sys.executable,
        "-O",
        "-W",
        "ignore",
        "-m",
        "pytest",
        "-o",
        "addopts=-q",
        "-o",
        "filterwarnings=",
        __file__,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
