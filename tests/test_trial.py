"""Trials: a model whose graph or quantized twin cannot be trusted never leaves `quantize`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.errors import LobcqError, TraceError
from lobcq_fx.tracing.trace import TracedModel
from lobcq_fx.trial import Outcome, call_trial, expected_of, relative_error
from tests.passes.graphs import linear, values


class Stateful(nn.Module):
    """Counts its calls, and adds the count."""

    def __init__(self):
        super().__init__()
        self.l = linear(64, 64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.l(x) + self.calls


class WritesToItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = linear(64, 64)

    def forward(self, x):
        return self.l(x.add_(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", [Stateful, WritesToItsInput, nn.Dropout])
def test_the_float_model_and_the_example_are_left_as_they_were(kind):
    model = nn.Sequential(kind()) if kind is not nn.Dropout else nn.Sequential(linear(64, 64), nn.Dropout())
    model.train()
    x = values(2, 64)
    before, state = x.clone(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    q = lobcq_fx.quantize(model, example_inputs=x)
    assert torch.equal(x, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    if kind is Stateful:  # the trials' calls are not counted
        expected = [model.eval()(x) for _ in range(2)]
        actual = [q(x) for _ in range(2)]
        assert torch.equal((actual[1] - actual[0]).round(), torch.ones(2, 64))
        assert (actual[0] - expected[0]).norm() < 0.5 * expected[0].norm()


def test_an_example_that_the_model_fails_on_is_the_example_s_fault():
    with pytest.raises(TraceError, match="example"):
        lobcq_fx.quantize(linear(64, 64), example_inputs=values(2, 63))


def wrong(monkeypatch, change):
    """Let every traced graph of a plain module compute something else."""
    from lobcq_fx.frontends import plain

    def traced(model, *args, trace=plain.trace_module):
        one = trace(model, *args)
        one.graph_module.bias = nn.Parameter(one.graph_module.bias.detach().clone())  # not the model's memory
        return TracedModel(change(one.graph_module), one.calling)

    monkeypatch.setattr(plain, "trace_module", traced)


def nudge(graph_module):
    graph_module.bias.data[3] += 0.5
    return graph_module


def not_a_number(graph_module):
    graph_module.bias.data[3] = float("nan")
    return graph_module


@pytest.mark.parametrize(
    ("change", "message"), [(nudge, r"differ from the model's by .* % \(relative RMS\)"), (not_a_number, "holds NaN")]
)
def test_a_graph_that_is_not_the_model_is_refused(monkeypatch, change, message):
    wrong(monkeypatch, change)
    with pytest.raises(TraceError, match=f"the traced graph is not the model: .*{message}.*Remedy"):
        lobcq_fx.quantize(linear(64, 64), example_inputs=values(2, 64))


def test_a_quantized_model_that_overflows_is_refused():
    """fp16 holds 60000, and not what rounding makes of a sum of many of them."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).half()
    with torch.no_grad():
        model[0].weight.fill_(0.97)
        model[0].weight[:, ::2] = 1.03
    x = torch.full((2, 64), 1010.0).half()
    assert model(x).isfinite().all()
    try:
        q = lobcq_fx.quantize(model, example_inputs=x)
    except LobcqError as error:
        assert "NaN or infinity" in str(error)  # noqa: PT017  (either outcome is right, a silent infinity is not)
    else:
        assert q(x).isfinite().all()


def test_the_measure_is_the_relative_rms_error():
    a, b = values(5, 4), values(5, 4, seed=9)
    one, other = Outcome.of({"a": a, "ids": torch.arange(3)}), Outcome.of({"a": a + b, "ids": torch.arange(3)})
    assert relative_error(one, other) == pytest.approx(float(b.norm() / a.norm()))
    assert relative_error(one, one) == 0


def test_an_infinite_result_of_the_float_model_may_stay_infinite():
    model = nn.Sequential(linear(64, 64), nn.Threshold(0, float("-inf")))
    q = lobcq_fx.quantize(model, example_inputs=values(2, 64))
    assert q(values(2, 64)).isinf().any()


@torch.no_grad()
def test_random_numbers_are_the_same_ones():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = linear(64, 64)

        def forward(self, x):
            return self.l(x) + torch.randn_like(x)

    state = torch.get_rng_state()
    lobcq_fx.quantize(Noisy(), example_inputs=values(2, 64))
    assert torch.equal(torch.get_rng_state(), state)


def test_expected_of_runs_in_eval_mode():
    model = nn.Dropout(0.9).train()
    outcome = expected_of(model, call_trial((values(3, 4),), {}))
    assert torch.equal(outcome.tensors[0], values(3, 4))
    assert model.training
