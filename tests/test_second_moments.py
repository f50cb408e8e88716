"""Second moments in execution order: those of the float model, whatever its graph does, and one at a time."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.passes.insert_observers import InsertObservers, observed
from lobcq_fx.pipeline import make_plan
from lobcq_fx.plan import PlannedWeight
from lobcq_fx.second_moments import SecondMoments
from lobcq_fx.tracing.trace import MAIN, trace_module

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


def found(model: nn.Module, calls: list[Tensor]) -> dict[str, Tensor]:
    graph_module = trace_module(deepcopy(model), (calls[0],)).graph_module
    plan, _ = make_plan({MAIN: graph_module}, CONFIG)
    InsertObservers(plan)(graph_module)
    with torch.no_grad():
        graph_module(calls[0].clone())
    if hasattr(model, "seen"):
        graph_module.seen.copy_(model.seen)  # type: ignore[union-attr, operator]
    statistics = observed(graph_module, plan)
    moments = SecondMoments(graph_module, plan, [[one] for one in calls])
    return {weight.source: total for weight, total in moments.of_weights(statistics) if total is not None}


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


@pytest.mark.parametrize("kind", [Tied, InPlace, Counting, Siblings])
def test_they_are_those_of_the_float_model(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, calls = kind().eval(), data()
    before = [one.clone() for one in calls]
    one, other = found(model, calls), expected(model, calls)
    assert one.keys() == other.keys()
    for name, total in one.items():
        torch.testing.assert_close(total.double(), other[name], rtol=1e-5, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(calls, before, strict=True))


def test_one_layer_is_held_at_a_time() -> None:
    layers = [nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6)]
    graph_module = trace_module(nn.Sequential(*layers), (data()[0],)).graph_module
    plan, _ = make_plan({MAIN: graph_module}, CONFIG)
    InsertObservers(plan)(graph_module)
    with torch.no_grad():
        graph_module(data()[0])
    moments = SecondMoments(graph_module, plan, [[one] for one in data()])
    weights: list[PlannedWeight] = []
    for weight, _ in moments.of_weights(observed(graph_module, plan)):
        weights.append(weight)
        live = [value for call in moments._calls for value in call.env.values() if isinstance(value, Tensor)]
        assert len(live) <= len(moments._calls)  # what each call waits at
        assert weight.source not in moments._values  # nor is the weight kept, which was read
    assert weights == list(plan.weights)


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
