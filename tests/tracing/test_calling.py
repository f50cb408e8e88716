"""ModuleCall: a call that the graph cannot serve is an error that names the argument, never a wrong answer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lobcq_fx.errors import CallError
from lobcq_fx.tracing.calling import ModuleCall, bind_arguments
from lobcq_fx.tracing.structure import Structure
from lobcq_fx.tracing.trace import trace_module
from tests.passes.graphs import linear, values


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear(32, 64)

    def forward(self, batch, offset, scale=2, hint=None):
        return self.layer(batch["x"] - batch["y"]) * scale + offset


def batch(*leading, seed=0):
    return {"x": values(*leading, 64, seed=seed), "y": values(*leading, 64, seed=seed + 1)}


@pytest.fixture(scope="module")
def traced():
    return trace_module(Model().eval(), (batch(3, 4), values(3, 1, 32)), {"scale": 2})


def call(traced, *args, **kwargs):
    outputs = traced.graph_module(*traced.calling.flatten(args, kwargs))
    return traced.calling.unflatten(outputs, args, kwargs)


@torch.no_grad()
def test_the_same_call_in_every_spelling(traced):
    x, offset = batch(2, 5), values(2, 1, 32)
    expected = Model().eval()(x, offset)
    torch.testing.assert_close(call(traced, x, offset, 2), expected)
    torch.testing.assert_close(call(traced, x, scale=2, offset=offset), expected)
    torch.testing.assert_close(call(traced, x, offset, 2, None), expected)
    reordered = {"y": x["y"], "x": x["x"]}
    torch.testing.assert_close(call(traced, reordered, offset, 2), expected)


WRONG = {
    "missing": (lambda x, o: ((x,), {"scale": 2}), "argument 'offset' is missing; the traced call takes batch, offset"),
    "unknown": (lambda x, o: ((x, o, 2), {"bias": 1}), "argument 'bias' was not in the traced call"),
    "not traced": (lambda x, o: ((x, o, 2, 1), {}), "argument 'hint' was not in the traced call"),
    "too many": (lambda x, o: ((x, o, 2, None, 5), {}), "5 positional arguments; forward takes batch, offset, scale"),
    "twice": (lambda x, o: ((x, o, 2), {"offset": o}), "argument 'offset' is given twice"),
    "other constant": (lambda x, o: ((x, o, 3), {}), "argument scale is 3; the graph was traced with 2"),
    "tensor for constant": (lambda x, o: ((x, o, o), {}), "argument scale is tensor"),
    "other keys": (lambda x, o: (({"x": o, "z": o}, o, 2), {}), "not built as in the traced call.*missing key.*'y'"),
    "other type": (lambda x, o: ((list(x.values()), o, 2), {}), "not built as in the traced call"),
    "fewer keys": (lambda x, o: (({"x": o}, o, 2), {}), "not built as in the traced call"),
    "no tensor": (lambda x, o: ((x, 1.0, 2), {}), "argument offset is a float; the traced call had a tensor"),
    "list for tensor": (lambda x, o: ((x, [o], 2), {}), "argument offset is a list"),
    "width": (
        lambda x, o: (({**x, "y": o}, o, 2), {}),
        r"argument batch\['y'\] has shape \[2, 1, 32\]; the graph was traced for \[any, any, 64\]",
    ),
    "rank": (lambda x, o: ((x, o[0], 2), {}), r"argument offset has shape \[1, 32\]; .* for \[any, 1, 32\]"),
    "one": (lambda x, o: ((x, o.repeat(1, 5, 1), 2), {}), r"offset has shape \[2, 5, 32\]; .* for \[any, 1, 32\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_name_the_argument(traced, case):
    arguments, message = WRONG[case]
    args, kwargs = arguments(batch(2, 5), values(2, 1, 32))
    with pytest.raises(CallError, match=message):
        traced.calling.flatten(args, kwargs)


def test_arguments_with_a_default_fill(traced):
    call = replace(traced.calling, fills={"offset": 7})
    x = values(2, 1, 32)
    tensor_first = replace(call, fills={})
    assert tensor_first.fills == {}
    single = ModuleCall(
        ("ids", "mask"), Structure(torch.utils._pytree.tree_structure({"ids": 0, "mask": 0})), {},
        Structure(torch.utils._pytree.tree_structure(0)), ((None, None), (None, None)), {"mask": 1},
    )  # fmt: skip
    ids = torch.zeros(2, 3)
    filled = single.flatten((ids,), {})
    assert torch.equal(filled[1], torch.ones(2, 3, dtype=torch.long))
    assert single.flatten((ids, x[:, 0]), {})[1] is not None
    with pytest.raises(CallError, match="'ids' is missing"):
        single.flatten((), {})


def test_json_round_trip(traced):
    restored = ModuleCall.from_dict(json.loads(json.dumps(traced.calling.to_dict())))
    assert restored.to_dict() == traced.calling.to_dict()
    args = (batch(2, 5), values(2, 1, 32), 2)
    for one, other in zip(restored.flatten(args, {}), traced.calling.flatten(args, {}), strict=True):
        assert one is other


def test_bound_arguments_are_in_forward_s_order():
    names, inputs = bind_arguments(Model(), (), {"offset": values(1), "batch": {}, "hint": None})
    assert names == ("batch", "offset", "scale", "hint")
    assert list(inputs) == ["batch", "offset"]
