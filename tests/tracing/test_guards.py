"""Size guards: at every size a traced model does what the model does, or refuses the call."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torch.nn import functional
from transformers import DynamicCache

import lobcq_fx
from lobcq_fx.errors import CallError, CheckpointError
from lobcq_fx.tracing.assumptions import SizeDecisions
from lobcq_fx.tracing.calling import ModuleCall
from lobcq_fx.tracing.guards import SizeGuards, describe
from lobcq_fx.tracing.sizes import size_oblivious
from lobcq_fx.tracing.trace import plain_graph_module, trace_module
from tests.families import quantized_causal_lm
from tests.passes.graphs import linear, values
from tests.storage.reindex import reindex


class Sized(nn.Module):
    """Two linears, and a forward that is given as a function of the module and its inputs x, y [B, T, 16]."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = linear(16, 16), linear(16, 16, seed=1), function

    def forward(self, x, y=None):
        return self.function(self, x) if y is None else self.function(self, x, y)


def branch(m, x):
    return m.a(x) if x.shape[1] > 4 else m.b(x)


def is_alone(m, x):
    return m.a(x) if x.shape[0] == 1 else m.b(x)


def padded_windows(m, x):
    rest = -x.shape[1] % 4
    x = functional.pad(x, (0, 0, 0, rest)) if rest else x
    return torch.stack([m.a(window) for window in x.split(4, 1)], 1)


def pairs(m, x):
    return m.a(x.view(x.shape[0], x.shape[1] // 2, 2, 16))


def parity(m, x):
    return m.a(x) if x.shape[1] % 2 else m.b(x)


def among(m, x):
    return m.a(x) if x.shape[1] in (3, 8) else m.b(x)


def both(m, x):
    return m.a(x) if x.shape[0] > 1 and x.shape[1] < 7 else m.b(x)


def many(m, x):
    return m.a(x) if x.numel() > 300 else m.b(x)


def root(m, x):
    return m.a(x) * int(x.shape[1] ** 0.5)


def halves(m, x):
    return [m.a(half) for half in x.chunk(2, 1)]


def squeezed(m, x):
    x = m.a(x).squeeze(1)
    return x.sum(1) if x.dim() == 3 else x


def implied(m, x):
    """Whether the slice reaches the end is known when the model asks for less."""
    x = x.narrow(1, 0, 4)
    return m.a(x) if x.shape[1] > 3 else m.b(x)


def first_token(m, x):
    """Export cannot keep the slice's size of 1 apart from the length, unless it takes lengths to be 2 or more."""
    return m.a(x[:, :1] + x)


def last_two(m, x):
    """In such a trace the slice has two columns of however many, and views of it go by that."""
    x = x[:, -2:]
    x = x[:, :1] + x
    return m.a(x.reshape(-1, 16)).view(x.shape[0], x.shape[1], 16)


def first_two(m, x):
    y = x[:, :2]
    y = m.a(y.reshape(-1, 16)).view(y.shape[0], y.shape[1], 16)
    return y[:, :1] + x


def asserted(m, x):
    assert x.shape[1] <= 8
    return m.a(x)


def shorter(m, x, y):
    return m.a(torch.cat((x, y), 1)) if x.shape[1] < y.shape[1] else m.b(torch.cat((x, y), 1))


def added(m, x, y):
    return m.a(x + y)


def free(m, x):
    """Looks at sizes, and does the same at all of them."""
    x = x * torch.arange(x.shape[1])[None, :, None]
    x = functional.pad(x, (0, 0, 0, -x.shape[1] % 4)).view(x.shape[0], -1, 4, 16)
    return m.a(functional.scaled_dot_product_attention(x, x, x)[:, :, : min(x.shape[2], 3)])


ONE = {
    # (function, length of the example, lengths that are served, all others of 1 to 12 are refused), at batches 1 and 3
    "branch": (branch, 8, range(5, 13)),
    "the other branch": (branch, 3, range(1, 5)),
    "windows": (padded_windows, 6, [5, 6, 7]),
    "whole windows": (padded_windows, 8, [8]),
    "pairs": (pairs, 6, range(2, 13, 2)),
    "odd": (parity, 7, range(1, 13, 2)),
    "one of two": (among, 8, [8]),
    "none of two": (among, 5, [1, 2, 4, 5, 6, 7, 9, 10, 11, 12]),
    "root": (root, 5, [5]),
    "halves": (halves, 6, range(2, 13)),
    "narrow": (implied, 6, range(4, 13)),
    "broadcast": (first_token, 5, range(1, 13)),
    "last two": (last_two, 5, range(2, 13)),
    "first two": (first_two, 5, range(1, 13)),
    "assert": (asserted, 6, range(1, 9)),
    "free": (free, 6, range(1, 13)),
}


@torch.no_grad()
@pytest.mark.parametrize("case", ONE)
def test_lengths_are_served_as_the_model_does_or_refused(case):
    function, length, served = ONE[case]
    model = Sized(function).eval()
    traced = trace_module(model, (values(2, length, 16),))
    for batch in (1, 3):
        for size in range(1, 13):
            x = values(batch, size, 16, seed=size)
            if size in served:
                actual = traced.calling.unflatten(traced.graph_module(*traced.calling.flatten((x,), {})), (), {})
                torch.testing.assert_close(actual, model(x))
            else:
                with pytest.raises(CallError, match=rf"argument x has s(ize {size} in dimension|hape).*quantize"):
                    traced.calling.flatten((x,), {})


@torch.no_grad()
@pytest.mark.parametrize("function", [is_alone, both, many, squeezed])
@pytest.mark.parametrize("sizes", [(2, 8), (1, 8), (3, 1), (1, 1)])
def test_batches_are_served_as_the_model_does_or_refused(function, sizes):
    model = Sized(function).eval()
    traced = trace_module(model, (values(*sizes, 16),))
    traced.calling.flatten((values(*sizes, 16),), {})  # its own example is never refused
    served = 0
    for other in [(batch, length) for batch in (1, 2, 3, 5) for length in (1, 4, 8)]:
        x = values(*other, 16)
        try:
            flat = traced.calling.flatten((x,), {})
        except CallError:
            continue
        served += 1
        torch.testing.assert_close(traced.calling.unflatten(traced.graph_module(*flat), (), {}), model(x))
    assert served > 0


@torch.no_grad()
@pytest.mark.parametrize("function", [shorter, added])
def test_sizes_of_two_inputs(function):
    model = Sized(function).eval()
    traced = trace_module(model, (values(2, 5, 16), values(2, 5 if function is added else 7, 16)))
    served = [(1, 1), (3, 3), (7, 7)] if function is added else [(1, 3), (1, 7), (3, 7)]
    for lengths in [(x, y) for x in (1, 3, 7) for y in (1, 3, 7)]:
        x, y = (values(2, length, 16, seed=length) for length in lengths)
        if lengths in served:
            torch.testing.assert_close(traced.graph_module(*traced.calling.flatten((x, y), {}))[0], model(x, y))
        else:
            with pytest.raises(
                CallError, match=r"argument (x has size . .*argument y|y has size . .*argument x) has size"
            ):
                traced.calling.flatten((x, y), {})


def test_the_error_says_what_was_assumed_and_what_to_do():
    q = lobcq_fx.quantize(Sized(branch), example_inputs=values(2, 8, 16))
    with pytest.raises(
        CallError,
        match=r"argument x has size 3 in dimension 1; .* for which x.shape\[1\] >= 5, .*: quantize again with",
    ):
        q(values(2, 3, 16))


def test_a_batch_of_one_that_means_something_else_is_a_graph_of_its_own():
    model = Sized(is_alone).eval()
    alone = trace_module(model, (values(1, 8, 16),))
    assert alone.calling.shapes == ((1, None, 16),)
    assert [node.target for node in alone.graph_module.graph.find_nodes(op="get_attr")] == ["a.weight", "a.bias"]
    with pytest.raises(CallError, match=r"shape \[2, 8, 16\]; the graph was traced for \[1, any, 16\]"):
        alone.calling.flatten((values(2, 8, 16),), {})


def test_a_saved_folder_keeps_them_and_one_without_still_loads(tmp_path):
    lobcq_fx.quantize(Sized(branch), example_inputs=values(2, 8, 16)).save_pretrained(tmp_path / "saved")
    x = values(2, 3, 16)
    with pytest.raises(CallError, match=r"x.shape\[1\] >= 5"):
        lobcq_fx.load(tmp_path / "saved")(x)
    path = tmp_path / "saved" / "graph.json"
    assert '"guards"' in path.read_text()

    def rewrite(change):
        graph = json.loads(path.read_text())
        calling = graph["graphs"]["main"]["calling"] if "graphs" in graph else graph["calling"]
        change(calling)
        path.write_text(json.dumps(graph))
        reindex(tmp_path / "saved")

    for damaged in ([["eval", "x", 1]], [[">=", ["size", 7, 0], 1]], [[">=", ["size", 0, 3], 1]], {}):
        rewrite(lambda calling, damaged=damaged: calling.update(guards=damaged))
        with pytest.raises(CheckpointError, match="damaged"):
            lobcq_fx.load(tmp_path / "saved")
    rewrite(lambda calling: calling.pop("guards"))
    assert lobcq_fx.load(tmp_path / "saved")(x).shape == x.shape


X = [torch.empty(6, 5), torch.empty(4)]
TREES = {
    "input0.shape[0] == 6": ["==", ["size", 0, 0], 6],
    "input0.shape[1] != 6": ["!=", ["size", 0, 1], 6],
    "input0.shape[0] % 4 == 2": ["==", ["%", ["size", 0, 0], 4], 2],
    "(0 - input0.shape[0]) % 4 == 2": ["==", ["%", ["-", 0, ["size", 0, 0]], 4], 2],
    "input0.shape[0] // 4 < input1.shape[0]": ["<", ["//", ["size", 0, 0], 4], ["size", 1, 0]],
    "max(input0.shape[0], 9) >= 9": [">=", ["max", ["size", 0, 0], 9], 9],
    "(input0.shape[1] > 4) and (min(3, input0.shape[0]) <= 3)": [
        "and",
        [">", ["size", 0, 1], 4],
        ["<=", ["min", 3, ["size", 0, 0]], 3],
    ],
    "(input0.shape[1] > 9) or (2 * (input0.shape[0] + 1) == 14)": [
        "or",
        [">", ["size", 0, 1], 9],
        ["==", ["*", 2, ["+", ["size", 0, 0], 1]], 14],
    ],
}


@pytest.mark.parametrize("text", TREES)
def test_a_condition_reads_and_computes_as_python_does(text):
    tree = json.loads(json.dumps(TREES[text]))
    assert describe(tree, lambda place: f"input{place}") == text
    assert eval(text, {"input0": X[0], "input1": X[1]}) is True
    guards = pickle.loads(pickle.dumps(copy.deepcopy(SizeGuards.from_list([tree]))))
    guards.check(X, str)
    grown = [torch.empty(7, 5), torch.empty(1)]
    if not eval(text, {"input0": grown[0], "input1": grown[1]}):
        with pytest.raises(CallError, match="argument 0 has size 7"):
            guards.check(grown, str)


def test_a_division_by_an_empty_input_refuses_the_call():
    guards = SizeGuards((["==", ["%", 8, ["size", 0, 0]], 0],))
    guards.check([torch.empty(4)], str)
    with pytest.raises(CallError, match="argument 0 has size 0"):
        guards.check([torch.empty(0)], str)


@pytest.mark.parametrize(
    "tree",
    [
        3,
        "x",
        [],
        ["==", 1],
        ["==", 1, "2"],
        ["==", 1, True],
        ["==", 1, 2.5],
        ["==", ["size", -1, 0], 2],
        ["==", ["size", 0, True], 2],
        ["**", 9, 9],
        ["==", ["**", 9, 9], 1],
        ["and", 1, ["==", 1, 1]],
        ["__import__", "os", 1],
    ],
)
def test_other_trees_are_no_conditions(tree):
    with pytest.raises(ValueError, match=r"is no (condition|number)"):
        SizeGuards.from_list([tree])


@torch.no_grad()
def test_compiled_calls_keep_one_graph_for_all_lengths_that_are_served():
    torch._dynamo.reset()
    q = lobcq_fx.quantize(Sized(branch), example_inputs=values(2, 8, 16))
    counter = CompileCounter()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend=counter)
    for length in (8, 6, 5, 11):
        x = values(3, length, 16)
        assert torch.equal(compiled(x), q(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_a_language_model_refuses_sizes_that_do_not_belong_together():
    q = quantized_causal_lm("gpt2")[1]
    ids = torch.arange(3, 9).view(2, 3)
    cache = q(ids, past_key_values=DynamicCache()).past_key_values
    mask = torch.ones(3, 4, dtype=torch.long)
    with pytest.raises(CallError, match=r"attention_mask has shape \[3, 4\]: pass \[2, 4\]"):
        q(ids[:, :1], attention_mask=mask, past_key_values=copy.deepcopy(cache))
    keys = r"argument past_key_values.layers\[0\].keys has size . in dimension 0 and argument input_ids"
    with pytest.raises(CallError, match=keys):
        q(ids[:1, :1], past_key_values=copy.deepcopy(cache))
    q(input_ids=ids[:, :1], past_key_values=cache)


def test_a_language_model_s_guards_round_trip():
    q = quantized_causal_lm("gpt2")[1]
    for calling in (graph.calling for graph in q.graphs.values()):
        assert calling.guards.conditions
        assert calling.to_dict()["guards"] == calling.guards.to_list()
    assert type(q.calling).from_dict(json.loads(json.dumps(q.calling.to_dict()))) == q.calling


def test_a_call_of_a_module_keeps_its_guards_in_json():
    calling = trace_module(Sized(padded_windows), (values(2, 6, 16),)).calling
    restored = ModuleCall.from_dict(json.loads(json.dumps(calling.to_dict())))
    assert restored.guards == calling.guards
    assert calling.guards.conditions


def test_a_graph_without_one_of_its_inputs_keeps_what_is_about_the_others():
    about = ["==", ["size", 0, 1], 4], [">=", ["size", 1, 0], 2], ["==", ["size", 2, 0], ["+", ["size", 0, 0], 1]]
    kept = SizeGuards(about).without(1)
    assert kept.conditions == (["==", ["size", 0, 1], 4], ["==", ["size", 1, 0], ["+", ["size", 0, 0], 1]])


class Rounds(nn.Module):
    """Adds up chunks of two rows in a loop."""

    def forward(self, x):
        total = x[:2] * 0
        for chunk in range(x.shape[0] // 2):
            total = total + x[2 * chunk : 2 * chunk + 2]
        return total


@pytest.mark.parametrize("trusted", [None, "transformers"])
def test_a_loop_has_as_many_rounds_as_in_the_example(trusted):
    with size_oblivious(), SizeDecisions(trusted) as decisions:
        program = torch.export.export(Rounds(), (torch.ones(6, 3),), dynamic_shapes=({0: Dim.AUTO},))
    guards = decisions.guards(plain_graph_module(program))
    guards.check([torch.ones(7, 3)], str)
    for rows in (4, 8):
        with pytest.raises(CallError, match=f"has size {rows} in dimension 0"):
            guards.check([torch.ones(rows, 3)], str)


def test_guards_of_a_graph_with_more_inputs_before_are_about_those_behind():
    about = (["==", ["size", 0, 1], ["*", 2, ["size", 1, 0]]], [">=", ["size", 2, 0], 3])
    moved = SizeGuards(about).behind(2)
    assert moved.conditions == (["==", ["size", 2, 1], ["*", 2, ["size", 3, 0]]], [">=", ["size", 4, 0], 3])
