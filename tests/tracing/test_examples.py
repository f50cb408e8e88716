"""Model inputs in every form that data come in, as calls."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
import transformers
from torch import nn

import lobcq_fx
from lobcq_fx.errors import CallError
from lobcq_fx.tracing.examples import call_of, without_labels
from lobcq_fx.tracing.trace import trace_module
from tests.passes.graphs import linear, values

X = values(3, 64)


@pytest.mark.parametrize(
    ("item", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, 2), (X, 2), {}),
        ([X, None], (X, None), {}),
        ({"x": X, "n": 2}, (), {"x": X, "n": 2}),
        (UserDict(x=X), (), {"x": X}),
        (transformers.BatchEncoding({"x": X}), (), {"x": X}),
        ((UserDict(x=X),), ({"x": X},), {}),
        ({"batch": transformers.BatchEncoding({"x": X})}, (), {"batch": {"x": X}}),
    ],
)
def test_forms_of_a_call(item, args, kwargs):
    assert call_of(item) == (args, kwargs)
    found = call_of(item)
    assert [type(value) for value in found[0]] == [type(value) for value in args]
    assert [type(value) for value in found[1].values()] == [type(value) for value in kwargs.values()]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("two words", "is a str that holds no tensor, but text: tokenize it first"),
        (["two", "words"], "is a list that holds no tensor, but text: tokenize it first"),
        ({"text": "two words"}, "is a dict that holds no tensor, but text: tokenize it first"),
        ([1, 2, 3], r"is a list that holds no tensor, but int: make tensors of it first, .*torch.tensor\(\[row\]\)"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "is a dict that holds no tensor, but int: make tensors"),
        (transformers.BatchEncoding({"input_ids": [[1, 2]]}), "is a BatchEncoding that holds no tensor, but int"),
        (X.numpy(), "is a ndarray that holds no tensor, but ndarray: make tensors of it first"),
        ({}, "is a dict that holds no tensor, but nothing"),
    ],
)
def test_what_is_no_call_is_refused_with_what_to_do_about_it(item, message):
    with pytest.raises(CallError, match=message):
        call_of(item)
    with pytest.raises(CallError, match=message):
        lobcq_fx.quantize(linear(32, 64), [item])


def test_labels_are_what_a_loss_alone_needs():
    item = {"input_ids": X, "labels": X, "next_sentence_label": X, "start_positions": X, "position_ids": X}
    assert list(without_labels(item)) == ["input_ids", "position_ids"]
    assert without_labels((X,)) == (X,)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = linear(64, 64)

    def forward(self, x, labels=None):
        out = self.linear(x)
        return out if labels is None else out + labels


def test_a_module_that_was_traced_with_labels_is_calibrated_with_them():
    config = lobcq_fx.LobcqConfig(activation_scale="static")
    q = lobcq_fx.quantize(Labelled(), [{"x": X, "labels": X}], config)
    assert not torch.equal(q(x=X, labels=X), q(x=X, labels=0 * X))
    without = lobcq_fx.quantize(Labelled(), [{"x": X, "labels": X}], config, example_inputs={"x": X})
    torch.testing.assert_close(without(x=X), q(x=X, labels=0 * X))


def test_a_call_may_pass_a_tokenizer_s_output_where_the_example_had_a_dictionary():
    class Nested(nn.Module):
        def forward(self, batch):
            return batch["x"] * 2

    traced = trace_module(Nested(), ({"x": X},))
    (flat,) = traced.calling.flatten((transformers.BatchEncoding({"x": X}),), {})
    assert flat is X


def test_one_tensor_in_two_places_of_the_example_is_two_inputs():
    class Difference(nn.Module):
        def forward(self, x, y):
            return x - y[0]

    traced = trace_module(Difference(), (X, [X]))
    flat = traced.calling.flatten((2 * X, [X]), {})
    assert torch.equal(traced.graph_module(*flat)[0], X)
