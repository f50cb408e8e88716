"""A model's calls run on tensors that were looked up once: what replaces one of them has to show."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.graph.bound_forward import BoundForward
from tests.families import own_causal_lm
from tests.passes.graphs import Function, graph_of, linear, parameter, values


def model():
    return nn.Sequential(linear(64, 64), nn.LayerNorm(64), nn.Sequential(linear(32, 64, seed=1)))


def test_it_gives_what_the_graph_module_gives():
    graph_module = graph_of(model())
    bound = BoundForward(graph_module)
    for x in (values(2, 3, 64), values(5, 1, 64)):
        assert torch.equal(bound(x)[0], graph_module(x)[0])
    with torch.no_grad():
        graph_module.get_parameter("2.0.weight").mul_(2)  # written to, not replaced
    assert torch.equal(bound(x)[0], graph_module(x)[0])


def test_code_that_is_generated_anew_is_noticed():
    graph_module = graph_of(Function(lambda m, x: x * m.scale, scale=parameter(64)))
    bound = BoundForward(graph_module)
    assert bound.serves(graph_module)
    graph_module.recompile()
    assert not bound.serves(graph_module)


def replaced_norm(q):
    """Another model's state, every tensor of it a new one."""
    state = {name: value + 1 if name.endswith("norm.weight") else value for name, value in q.state_dict().items()}
    q.load_state_dict(state, assign=True)


def shared(q):
    q.share_memory()
    with torch.no_grad():
        for name, value in q.named_parameters():
            if name.endswith("norm.weight"):
                value.add_(1)


@pytest.mark.parametrize("change", [replaced_norm, shared])
@torch.no_grad()
def test_tensors_that_are_replaced_are_looked_up_again(change):
    q, ids = own_causal_lm("llama"), torch.tensor([[5, 6, 7, 8]])
    before = q(ids).logits
    change(q)
    after = q(ids).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, q.graph_module(*q.calling.flatten((), {"input_ids": ids}))[0])


@torch.no_grad()
def test_a_copy_has_tensors_of_its_own():
    q, x = lobcq_fx.quantize(model(), example_inputs=values(2, 3, 64)), values(2, 3, 64)
    expected = q(x)
    other = copy.deepcopy(q)
    for one in other.parameters():
        one.zero_()
    assert torch.equal(q(x), expected)
    assert not other(x).any()
