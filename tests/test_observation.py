"""What is seen of a graph, whole or a segment at a time: the same, and that of the float model."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.errors import CalibrationError
from lobcq_fx.frontends import front_end_of
from lobcq_fx.observation import Observation
from lobcq_fx.pipeline import make_plan
from lobcq_fx.preparation import Preparation
from lobcq_fx.tracing.trace import MAIN, trace_module
from tests.families import causal_lm

CONFIG = LobcqConfig(rounding="compensated", min_in_features=1)


class Tied(nn.Module):
    """One weight reads two activations, another layer comes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(torch.relu(self.second(torch.relu(self.first(x)))))


class InPlace(nn.Module):
    """An activation changes after a layer has read it, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x)
        y = self.first(h)
        h[..., 1:].mul_(3)
        return self.second(h) + y


class Counting(nn.Module):
    """Each call writes to a buffer that it has read; every call is to see it as it was at first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(32, 32), nn.Linear(32, 8)
        self.register_buffer("seen", torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x * self.seen)
        self.seen.add_(1)
        return self.last(torch.relu(y))


class Siblings(nn.Module):
    """Two layers of one activation, a residual, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return self.c(h + self.a(h) + self.b(h)[..., :32])


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, rows, 32, generator=generator) for rows in (5, 9, 7)]


def found(model: nn.Module, calls: list[Tensor], limit: int | None) -> dict[str, Tensor]:
    graph_module = trace_module(deepcopy(model), (calls[0],)).graph_module
    plan, _ = make_plan({MAIN: graph_module}, CONFIG)
    parts = Observation(graph_module, plan, limit=limit).run([[one] for one in calls], moments=True)
    return {
        weight.source: total
        for part in parts
        for weight, total in part.moments(part.statistics)
        if isinstance(total, Tensor)
    }


@torch.no_grad()
def expected(model: nn.Module, calls: list[Tensor]) -> dict[str, Tensor]:
    """By hooks on the float model, a fresh copy for each call."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, 32).double()
            sums[name] = sums.get(name, torch.zeros(32, 32, dtype=torch.float64)) + rows.T @ rows

        return add

    for call in calls:
        copied = deepcopy(model)
        for name, layer in copied.named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(hook(f"{name}.weight"))
        copied(call.clone())
    return sums


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("kind", [Tied, InPlace, Counting, Siblings])
def test_moments_are_those_of_the_float_model(kind: type[nn.Module], limit: int | None) -> None:
    torch.manual_seed(0)
    model, calls = kind().eval(), data()
    before = [one.clone() for one in calls]
    one, other = found(model, calls, limit), expected(model, calls)
    assert one.keys() == other.keys()
    for name, total in one.items():
        torch.testing.assert_close(total.double(), other[name], rtol=1e-5, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(calls, before, strict=True))


def layers(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(count)))


def test_a_segment_is_held_at_a_time() -> None:
    graph_module = trace_module(layers(6), (data()[0],)).graph_module
    plan, _ = make_plan({MAIN: graph_module}, CONFIG)
    of_one = 32 * 33 * 4
    observation = Observation(graph_module, plan, limit=2 * of_one)
    held: list[dict[str, Any]] = []
    loaded: list[set[str]] = []
    seen = []
    parts = observation.run(
        [[one] for one in data()],
        moments=True,
        loaded=lambda segment: nullcontext(loaded.append(set(segment.attributes))),
        between=lambda: held,
    )
    for part in parts:
        seen += [weight.source for weight, _ in part.moments(part.statistics)]
        assert [len(values) for values in held] == [0 if part.index == 2 else 1] * 3  # what each call waits at
    assert seen == [weight.source for weight in plan.weights]
    assert [len(names) for names in loaded] == [4, 4, 4]
    assert not set.intersection(*loaded)


def test_segments_see_what_the_whole_sees() -> None:
    """To the bit, for a model whose layers share values beside the hidden state, with activations spilled or not."""
    model, ids = causal_lm("llama"), torch.arange(24).view(2, 12) + 3
    traced = front_end_of(model).trace(model, None, static_cache=False)
    plan, _ = make_plan(traced.graph_modules, CONFIG)
    main = traced.graphs[MAIN]
    calls = [
        main.calling.flatten((), {"input_ids": one, "attention_mask": torch.ones_like(one)}) for one in (ids, ids + 9)
    ]
    (whole,) = Observation(main.graph_module, plan).run(calls, moments=True)
    expected = dict(whole.moments(whole.statistics))
    observation = Preparation(plan, traced.graph_modules).observation(limit=0)
    assert len(observation.segments) > 2 * model.config.num_hidden_layers
    count = 0
    for part in observation.run(calls, moments=True):
        for one, statistics in part.statistics.items():
            assert torch.equal(statistics.sample(), whole.statistics[one].sample())
            assert torch.equal(statistics.mean_squares(), whole.statistics[one].mean_squares())
        for weight, moments in part.moments(part.statistics):
            assert torch.equal(moments, expected[weight])  # type: ignore[arg-type]
            count += 1
    assert count == len(plan.weights)


def test_matmuls_that_are_smoothed_together_are_in_one_segment() -> None:
    model = causal_lm("llama")
    traced = front_end_of(model).trace(model, None, static_cache=False)
    plan, _ = make_plan(traced.graph_modules, LobcqConfig(smoothing="folded", rounding="compensated"))
    observation = Preparation(plan, traced.graph_modules).observation(limit=0)
    last = [{one.layer.rpartition(".")[2] for one in observation.plan_of(s).quantized} for s in observation.segments]
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} in last or {"q_proj", "k_proj", "v_proj"} in last
    assert {
        "gate_proj",
        "up_proj",
        "down_proj",
    } in last  # of which up's rows are divided by the scale of down's columns


def test_without_calls_there_is_nothing_to_see() -> None:
    graph_module = trace_module(layers(1), (data()[0],)).graph_module
    plan, _ = make_plan({MAIN: graph_module}, CONFIG)
    with pytest.raises(CalibrationError, match="calibration_data is empty"):
        list(Observation(graph_module, plan).run(iter(()), moments=True))


@torch.no_grad()
def test_weights_are_compensated_by_what_all_their_readers_see() -> None:
    """Through quantize: errors of a tied weight, weighted by the moments of both activations, fall."""
    torch.manual_seed(0)
    model, calls = Tied().eval(), [one @ torch.randn(32, 32) for one in data() * 4]
    errors = {}
    for rounding in ("nearest", "compensated"):
        q = lobcq_fx.quantize(model, calls, LobcqConfig(rounding=rounding, mode="w4a16"))
        errors[rounding] = sum(float((q(one) - model(one)).square().mean()) for one in calls)
    assert errors["compensated"] < 0.9 * errors["nearest"]
