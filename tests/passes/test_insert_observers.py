"""insert_observers: one pass-through module for each distinct activation that a quantized matmul reads."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.calibration.statistics import scaled_sample
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CalibrationError
from lobcq_fx.passes.insert_observers import InsertObservers, observed
from lobcq_fx.plan import QuantizationPlan
from tests.passes.graphs import (
    Function,
    assert_metadata,
    assert_unchanged,
    aten,
    linear,
    lobcq,
    nodes,
    normalized,
    observe,
    rewritten,
    run,
    values,
)  # fmt: skip

STATIC = LobcqConfig(activation_scale="static")


def siblings():
    """q and k read one activation, o another; head is excluded."""
    members = {name: linear(64, 64, seed=seed) for seed, name in enumerate(("q", "k", "o", "lm_head"))}
    return Function(lambda m, x: m.lm_head(m.o(torch.relu(m.q(x) * m.k(x)))), **members)


def seen(graph_module):
    """Statistics by layer."""
    plan = QuantizationPlan.of(graph_module, LobcqConfig())
    return {matmul.layer: statistics for matmul, statistics in observed(graph_module, plan).items()}


def observers(graph_module):
    return [node for node in graph_module.graph.nodes if node.op == "call_module"]


def test_one_observer_for_each_distinct_activation():
    graph_module = normalized(siblings())
    assert observers(graph_module) == []
    assert len(nodes(graph_module, aten.linear.default)) == 4
    assert observe(graph_module).modified

    first, second = observers(graph_module)
    assert [user.target for user in first.users] == [aten.linear.default] * 2
    assert [user.target for user in second.users] == [aten.linear.default]
    found = seen(graph_module)
    assert found["q"] is found["k"]
    assert found["q"] is not found["o"]
    assert "lm_head" not in found
    assert found["k"].layer == "q"
    assert_unchanged(InsertObservers(QuantizationPlan.of(graph_module, LobcqConfig())), graph_module)


def test_results_are_unchanged_and_statistics_are_those_of_the_activation():
    model = siblings()
    graph_module = normalized(model)
    observe(graph_module)
    assert_metadata(graph_module, values(2, 5, 64))
    graph_module = normalized(model)
    observe(graph_module)
    batches = [values(2, 3, 64, seed=2), values(1, 1, 64, seed=3)]
    for x in batches:
        torch.testing.assert_close(run(graph_module, x), model(x))
    statistics = seen(graph_module)["q"]
    assert statistics.num_rows == 7
    assert statistics.num_scalars == 7 * 64
    assert float(statistics.absmax()) == max(float(x.abs().max()) for x in batches)


def test_nothing_to_observe_where_everything_is_refused():
    graph_module = normalized(siblings())
    plan = QuantizationPlan.of(graph_module, LobcqConfig(exclude=["*"]))
    assert_unchanged(InsertObservers(plan), graph_module)


def test_rewrite_takes_the_static_scale_and_leaves_the_observer_dead():
    graph_module = normalized(siblings())
    observe(graph_module, STATIC)
    x = values(2, 3, 64)
    run(graph_module, x)
    result, records = rewritten(graph_module, STATIC)
    assert result.modified
    assert float(graph_module.q.activation_scale) == pytest.approx(float(x.abs().max()) / 13888)
    assert all(15 < record.activation_sqnr_db < 35 for record in records if record.quantized)
    assert all(not node.users for node in observers(graph_module))
    assert len(nodes(graph_module, lobcq.linear.default)) == 3


def test_never_saw_data_is_an_error_that_names_the_layer():
    graph_module = normalized(siblings())
    observe(graph_module, STATIC)
    run(graph_module, torch.empty(0, 3, 64))
    with pytest.raises(CalibrationError, match="no activation of q was observed"):
        rewritten(graph_module, STATIC)


def test_observers_without_data_disturb_no_per_token_rewrite():
    graph_module = normalized(siblings())
    observe(graph_module)
    _, records = rewritten(graph_module)
    assert {record.activation_sqnr_db for record in records} == {None}


@pytest.mark.parametrize("scale", ["static", "per_token"])
def test_the_sample_is_in_units_of_the_scale_that_the_layer_will_use(scale):
    graph_module = normalized(linear(32, 64), values(4, 64))
    config = LobcqConfig(activation_scale=scale)
    observe(graph_module, config)
    x = values(4, 64) * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    run(graph_module, x)
    (statistics,) = observed(graph_module, QuantizationPlan.of(graph_module, config)).values()
    sample = scaled_sample(statistics, scale)
    largest = sample.abs().amax(dim=1).sort().values
    rows = x.abs().amax(dim=1)
    expected = rows / rows.max() * 13888 if scale == "static" else torch.full((4,), 13888.0)
    torch.testing.assert_close(largest, expected.sort().values)
