"""Even out the columns of activations and weights against each other before either is rounded.

For powers of two s, `x @ w.T == (x / s) @ (w * s).T` to the last bit. Columns share the scale of their array, so that
an activation's error is the same in all of them, however small their own values: what stands out costs its neighbours.
Weights of columns that are large in the activation tend to be small, and suffer from theirs. The rounding errors of
both operands together are least, to first order, where s is the root of rms(x) / rms(w), column by column: SmoothQuant
(Xiao et al., ICML 2023, arXiv 2211.10438) at its middle setting, by mean squares.

A norm's weight, or the rows of the linear that makes a factor of x, take the division over at no cost; elsewhere x is
multiplied with 1 / s, where the settings allow that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor, fx, nn

from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.float_weights import FloatWeights, WeightScales
from lobcq_fx.graph.absorbers import absorber_of
from lobcq_fx.graph.attributes import delete_attribute, get_attribute, has_attribute, register_attribute
from lobcq_fx.graph.matmuls import Matmul
from lobcq_fx.passes.insert_observers import unobserved
from lobcq_fx.plan import PlannedMatmul, PlannedWeight, QuantizationPlan
from lobcq_fx.tracing.trace import MAIN

LARGEST_STEP = 12
"""Of a scale's exponent from the middle: fp16 holds what it multiplies."""

Statistics = Mapping[PlannedMatmul, ActivationStatistics]


@dataclass(frozen=True)
class Smoothed:
    """What smoothing did.

    scales: of weights. statistics: of activations as they are encoded now. matmuls: where each division went, "folded"
        into what comes before or "multiplied".
    """

    scales: dict[PlannedWeight, WeightScales]
    statistics: dict[PlannedMatmul, ActivationStatistics]
    matmuls: dict[PlannedMatmul, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Group:
    """The matmuls that read one activation, and what can absorb a division of it, in every graph alike.

    parameters: names, to be divided. rows_of: so are its rows. free: nothing has to be multiplied.
    """

    matmuls: tuple[PlannedMatmul, ...]
    parameters: tuple[str, ...] = ()
    rows_of: PlannedWeight | None = None
    free: bool = False


def smooth(plan: QuantizationPlan, graph_modules: Mapping[str, fx.GraphModule], statistics: Statistics) -> Smoothed:
    """Choose a scale for each activation that the settings want evened out, and divide by it what absorbs that.

    Args:
        plan: made of the graphs.
        graph_modules: by name, `MAIN` among them, which gets the parameters that are divided, and the input scales of
            activations that have to be multiplied.
        statistics: of the activations; those without any are left as they are.
    """
    result, root = Smoothed({}, dict(statistics)), graph_modules[MAIN]
    groups = _groups(plan, graph_modules[MAIN])
    others = [(_groups(plan, one), one) for name, one in graph_modules.items() if name != MAIN]
    times_read = plan.times_read
    for group in groups:
        weights = [one.weight for one in group.matmuls if one.weight is not None]
        seen = next((statistics[one] for one in group.matmuls if one in statistics), None)
        wanted = {one.config.smoothing for one in group.matmuls if one.weight is not None}
        if seen is None or not wanted or "none" in wanted:
            continue
        if any(times_read[weight] > 1 or weight.stacked for weight in weights):
            continue
        free = group.free and all(_alike(group, *other) for other in others)
        free = free and (group.rows_of is None or times_read[group.rows_of] == 1)
        if not free and wanted != {"everywhere"}:
            continue
        scale = balanced_scale(seen.mean_squares(), map(FloatWeights(root), weights))
        if free:
            _divide(root, group, scale, result.scales)
        else:
            _register_input_scale(root, group, scale)
        divided = seen.divided(scale)
        for one in group.matmuls:
            if one.weight is not None:
                known = result.scales.get(one.weight, WeightScales())
                result.scales[one.weight] = replace(known, columns=scale)
                result.statistics[one] = divided
                result.matmuls[one] = "folded" if free else "multiplied"
    return result


def balanced_scale(mean_squares: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """The powers of two nearest to the root of rms(x) / rms(w), around 1.

    Args:
        mean_squares: of an activation's columns, fp32 [K], on the CPU.
        weights: [N_i, K] each, that are multiplied with it.

    Returns:
        fp32 [K], on the CPU; 1 for columns that are 0 in all that was seen, or in the weights.
    """
    sums = [(one.float().square().sum(0).cpu(), one.shape[0]) for one in weights]
    of_weights = sum((total for total, _ in sums), torch.zeros_like(mean_squares)) / sum(rows for _, rows in sums)
    usable = (mean_squares > 0) & (of_weights > 0)
    steps = torch.where(usable, (mean_squares / of_weights).log2() / 4, 0.0)
    steps = torch.where(usable, steps - steps[usable].mean() if bool(usable.any()) else steps, 0.0)
    return torch.exp2(steps.round().clamp(-LARGEST_STEP, LARGEST_STEP))


def _groups(plan: QuantizationPlan, graph_module: fx.GraphModule) -> list[_Group]:
    """The groups of a graph, in execution order."""
    pairs = plan.pair(graph_module)
    planned_of = {matmul.node: planned for matmul, planned in pairs}
    reading: dict[fx.Node, list[tuple[Matmul, PlannedMatmul]]] = {}
    for matmul, planned in pairs:
        if matmul.obstacle is None:
            reading.setdefault(unobserved(graph_module, matmul.activation), []).append((matmul, planned))
    return [_group(activation, members, planned_of, graph_module) for activation, members in reading.items()]


def _group(
    activation: fx.Node,
    members: list[tuple[Matmul, PlannedMatmul]],
    planned_of: Mapping[fx.Node, PlannedMatmul],
    graph_module: fx.GraphModule,
) -> _Group:
    matmuls = tuple(planned for _, planned in members)
    absorber = absorber_of(activation)
    nodes = {matmul.node for matmul, _ in members}
    observers = {user for user in activation.users if unobserved(graph_module, user) is not user}
    readers = set(chain(activation.users, *(observer.users for observer in observers))) - observers
    if absorber is None or readers != nodes or any(one.weight is None for one in matmuls):
        return _Group(matmuls)
    if absorber.linear is None:
        return _Group(matmuls, absorber.parameters, free=True)
    linear = planned_of.get(absorber.linear)
    if linear is None or linear.weight is None:
        return _Group(matmuls)
    return _Group(matmuls, absorber.parameters, linear.weight, free=True)


def _alike(group: _Group, others: list[_Group], graph_module: fx.GraphModule) -> bool:
    """Whether another graph that runs any of the matmuls has the same group, on the tensors of the main graph."""
    own = any(has_attribute(graph_module, name) for name in group.parameters)
    met = [other for other in others if not set(group.matmuls).isdisjoint(other.matmuls)]
    return not own and all(other == group for other in met)


def _divide(root: fx.GraphModule, group: _Group, scale: Tensor, scales: dict[PlannedWeight, WeightScales]) -> None:
    for name in group.parameters:
        parameter = get_attribute(root, name)
        divided = parameter.detach() / scale.to(parameter)
        delete_attribute(root, name)  # the float model's stays as it is
        register_attribute(root, name, nn.Parameter(divided, requires_grad=False))
    if group.rows_of is not None:
        scales[group.rows_of] = replace(scales.get(group.rows_of, WeightScales()), rows=1 / scale)


def _register_input_scale(root: fx.GraphModule, group: _Group, scale: Tensor) -> None:
    first = next(one for one in group.matmuls if one.weight is not None)
    assert first.weight is not None
    assert first.input_scale is not None
    register_attribute(root, first.input_scale, (1 / scale).to(get_attribute(root, first.weight.source)))
