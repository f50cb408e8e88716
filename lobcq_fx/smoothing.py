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
from itertools import chain, takewhile

import torch
from torch import Tensor, fx, nn

from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.float_weights import FloatWeights, WeightScales
from lobcq_fx.graph.absorbers import Absorber, absorber_of
from lobcq_fx.graph.attributes import get_attribute, has_attribute, register_attribute, replace_attribute
from lobcq_fx.graph.columns import CASTS, same_columns, with_these_columns
from lobcq_fx.graph.matmuls import Matmul
from lobcq_fx.graph.operands import readers_of
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
class SmoothingGroup:
    """The matmuls that read what one absorber makes, in every graph alike; or one activation that has none.

    readings: by the activation that they read, which may have rows of it in another order.
    absorber: what has to be divided; None where nothing can be.
    rows_of: the weight whose rows are to be, those of `rows`.
    floats: names of weights that stay in float and are multiplied, and whether they are [K, N].
    by_group: each matrix of a stack has a scale of its own, by which rows of its group are divided.
    """

    readings: tuple[tuple[PlannedMatmul, ...], ...]
    parameters: tuple[str, ...] = ()
    rows_of: PlannedWeight | None = None
    rows: tuple[int, int] = (0, 0)
    floats: tuple[tuple[str, bool], ...] = ()
    by_group: bool = False
    free: bool = False

    @property
    def matmuls(self) -> tuple[PlannedMatmul, ...]:
        """All of them."""
        return tuple(chain(*self.readings))


def smoothing_groups(plan: QuantizationPlan, graph_modules: Mapping[str, fx.GraphModule]) -> list[SmoothingGroup]:
    """What is smoothed together, in execution order.

    Args:
        plan: made of the graphs.
        graph_modules: by name, `MAIN` among them, without observers.
    """
    others = [(_groups(plan, one), one) for name, one in graph_modules.items() if name != MAIN]
    times_read = plan.times_read

    def decided(group: SmoothingGroup) -> SmoothingGroup:
        alike = group.free and all(_alike(group, *other) for other in others)
        return replace(group, free=alike and (group.rows_of is None or times_read[group.rows_of] == 1))

    return [decided(group) for group in _groups(plan, graph_modules[MAIN])]


def smooth(
    plan: QuantizationPlan, root: fx.GraphModule, groups: Iterable[SmoothingGroup], statistics: Statistics
) -> Smoothed:
    """Choose a scale for each activation that the settings want evened out, and divide by it what absorbs that.

    Args:
        plan: made of the graph.
        root: the main graph, which gets the parameters that are divided, and the input scales of activations that have
            to be multiplied.
        groups: the plan's.
        statistics: of the activations; those without any are left as they are.
    """
    result, times_read = Smoothed({}, dict(statistics)), plan.times_read
    for group in groups:
        free = group.free and _may_be_smoothed(group.matmuls, statistics, times_read)
        for matmuls in [group.matmuls] if free else group.readings:
            wanted = {one.config.smoothing for one in matmuls if one.weight is not None}
            if not _may_be_smoothed(matmuls, statistics, times_read) or (not free and wanted != {"everywhere"}):
                continue
            scale = _scale(matmuls, statistics, FloatWeights(root), free and group.by_group)
            if free:
                _divide(root, group, scale, result.scales)
            else:
                _register_input_scale(root, matmuls, scale)
            _note(matmuls, scale, "folded" if free else "multiplied", result)
    return result


def _may_be_smoothed(
    matmuls: Iterable[PlannedMatmul], statistics: Statistics, times_read: Mapping[PlannedWeight, int]
) -> bool:
    """Whether the settings of all that are quantized want it, data were seen, and no weight meets anything else."""
    quantized = [one for one in matmuls if one.weight is not None]
    return bool(quantized) and all(
        one.config.smoothing != "none" and one in statistics and times_read[one.weight] == 1
        for one in quantized
        if one.weight is not None
    )


def _scale(matmuls: Iterable[PlannedMatmul], statistics: Statistics, weights: FloatWeights, by_group: bool) -> Tensor:
    """For all activations of some matmuls, fp32 [K]; or for each group of one that has groups, [E, K]."""
    read = [(one.weight, statistics[one]) for one in matmuls if one.weight is not None]
    if by_group:
        ((stack, seen),) = read
        matrices = zip(seen.mean_squares_of_groups(), weights.matrices(stack), strict=True)
        return torch.stack([balanced_scale(mean_squares, [matrix]) for mean_squares, matrix in matrices])
    distinct = {id(seen): seen.mean_squares() for _, seen in read}
    mean_squares = torch.stack(list(distinct.values())).mean(0)
    return balanced_scale(mean_squares, chain.from_iterable(weights.matrices(weight) for weight, _ in read))


def _note(matmuls: Iterable[PlannedMatmul], scale: Tensor, where: str, result: Smoothed) -> None:
    """That weights and statistics of these have been scaled."""
    divided: dict[int, ActivationStatistics] = {}
    for one in matmuls:
        if one.weight is None:
            continue
        seen = result.statistics[one]
        if id(seen) not in divided:
            divided[id(seen)] = seen.divided(scale)
        known = result.scales.get(one.weight, WeightScales())
        result.scales[one.weight] = replace(known, columns=scale)
        result.statistics[one] = divided[id(seen)]
        result.matmuls[one] = where


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


def _groups(plan: QuantizationPlan, graph_module: fx.GraphModule) -> list[SmoothingGroup]:
    """The groups of a graph, in execution order."""
    pairs = [(matmul, planned) for matmul, planned in plan.pair(graph_module) if matmul.obstacle is None]
    linears = {matmul.node: matmul for matmul, _ in pairs}
    planned_of = {matmul.node: planned for matmul, planned in pairs}
    sources: dict[fx.Node, tuple[Absorber | None, list[Matmul]]] = {}
    for matmul, _ in pairs:
        source, absorber = _absorbed(matmul.activation, linears)
        sources.setdefault(source, (absorber, []))[1].append(matmul)
    return [_group(source, *found, planned_of, linears) for source, found in sources.items()]


def _absorbed(activation: fx.Node, linears: Mapping[fx.Node, Matmul]) -> tuple[fx.Node, Absorber | None]:
    """What an activation's columns come from, and can be divided there; itself, and None, where they cannot."""
    for node in with_these_columns(activation):
        absorber = absorber_of(node, linears)
        if absorber is not None:
            return node, absorber
    return activation, None


def _group(
    source: fx.Node,
    absorber: Absorber | None,
    members: list[Matmul],
    planned_of: Mapping[fx.Node, PlannedMatmul],
    linears: Mapping[fx.Node, Matmul],
) -> SmoothingGroup:
    reading: dict[fx.Node, list[PlannedMatmul]] = {}
    for one in members:
        reading.setdefault(one.activation, []).append(planned_of[one.node])
    readings = tuple(map(tuple, reading.values()))
    floats = [one for one in members if planned_of[one.node].weight is None]
    alone = {one.node for one in members} == _readers(source)
    if absorber is None or not alone or not all(map(_can_be_multiplied, floats)):
        return SmoothingGroup(readings)
    names = tuple((str(one.weight.target), one.flipped) for one in floats if one.weight is not None)
    if absorber.linear is None:
        return SmoothingGroup(readings, absorber.parameters, floats=names, free=True)
    divided = planned_of[absorber.linear].weight
    if divided is None or (divided.stacked and not _in_its_groups(source, linears[absorber.linear], members)):
        return SmoothingGroup(readings)
    return SmoothingGroup(readings, absorber.parameters, divided, absorber.rows, names, divided.stacked, free=True)


def _readers(source: fx.Node) -> set[fx.Node]:
    """What reads the columns of a node, behind operators that leave them alone."""
    found: set[fx.Node] = set()
    waiting = [source]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if same_columns(user) is node:
                waiting.append(user)
            else:
                found.add(user)
    return found


def _can_be_multiplied(matmul: Matmul) -> bool:
    """Whether the columns of a weight that stays in float can be: nothing else reads it, and its dtype has the room."""
    assert matmul.weight is not None
    alone = readers_of(matmul.node.graph, str(matmul.weight.target)) == {matmul.node}
    return alone and matmul.weight.meta["val"].dtype in (torch.float32, torch.bfloat16)


def _in_its_groups(source: fx.Node, stack: Matmul, members: list[Matmul]) -> bool:
    """Whether one matmul alone reads what a stack gives, its rows grouped as they were."""
    (reader, *others) = members
    if others or not reader.grouped or reader.offsets is not stack.offsets:
        return False
    moves = takewhile(lambda node: node is not source, with_these_columns(reader.activation))
    return all(node.target in CASTS for node in moves)


def _alike(group: SmoothingGroup, others: list[SmoothingGroup], graph_module: fx.GraphModule) -> bool:
    """Whether another graph that runs any of the matmuls has the same group, on the tensors of the main graph."""
    names = (*group.parameters, *(name for name, _ in group.floats))
    own = any(has_attribute(graph_module, name) for name in names)
    met = [other for other in others if not set(group.matmuls).isdisjoint(other.matmuls)]
    return not own and all(other == group for other in met)


def _divide(
    root: fx.GraphModule, group: SmoothingGroup, scale: Tensor, scales: dict[PlannedWeight, WeightScales]
) -> None:
    for name in group.parameters:
        _replace(root, name, get_attribute(root, name).detach() / scale.to(get_attribute(root, name)))
    for name, flipped in group.floats:
        columns = scale[:, None] if flipped else scale
        _replace(root, name, get_attribute(root, name).detach() * columns.to(get_attribute(root, name)))
    if group.rows_of is not None:
        known = scales.get(group.rows_of, WeightScales())
        rows = torch.ones((*scale.shape[:-1], group.rows_of.shape[-2]), dtype=scale.dtype, device=scale.device)
        rows[..., slice(*group.rows)] = 1 / scale
        scales[group.rows_of] = replace(known, rows=rows if known.rows is None else rows * known.rows)


def _replace(root: fx.GraphModule, name: str, value: Tensor) -> None:
    """The float model's stays as it is."""
    replace_attribute(root, name, nn.Parameter(value, requires_grad=False))


def _register_input_scale(root: fx.GraphModule, matmuls: Iterable[PlannedMatmul], scale: Tensor) -> None:
    first = next(one for one in matmuls if one.weight is not None)
    assert first.weight is not None
    assert first.input_scale is not None
    register_attribute(root, first.input_scale, (1 / scale).to(get_attribute(root, first.weight.source)))
