"""Spend a budget of bits where the model's results need them: a mode and formats for each layer.

How far a layer's rounding moves the results is measured on the model, once, in the settings' own formats. What other
formats would do follows from their rounding errors: to first order, a distance between distributions such as the KL
divergence grows with the squares of a layer's errors (HAWQ-V2, Dong et al., NeurIPS 2020, arXiv 1911.03852, has the
same model with second derivatives).
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from lobcq_fx.calibration.encode_activation import decode_activation, encode_activation
from lobcq_fx.calibration.rounding_error import activation_error, column_power, rounded_weight, weight_error
from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import ConfigError
from lobcq_fx.float_weights import FloatWeights
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.format.spec import ALLOWED_ARRAY_SIZES
from lobcq_fx.graph.aliasing import writes_inputs
from lobcq_fx.graph.written import kept, state_of
from lobcq_fx.passes.insert_observers import PastObservers, observed
from lobcq_fx.plan import PlannedMatmul, PlannedWeight, QuantizationPlan

Distance = Callable[[Sequence[Any], Sequence[Any]], float]
"""Of a graph's outputs from what they should be, flat."""

Progress = Callable[[int, int], None]

OBSERVED_CALLS = 16
"""Of the calibration data, for rounding errors: samples of activations settle early."""

MEASURED_CALLS = 2
"""Of these, for the distance of the results: one run of the model for each group of layers and call."""

CODEBOOKS = (2, 4, 8, 16)
"""That weights and activations choose from; fewer than 2 save an eighth of a bit at twice the error."""

GAP = 1e-3
"""Of the sum of errors, that is left to a better choice: the rest is not worth the search."""

FLOAT_BITS = 16.0
"""What a scalar in float counts as, whatever its dtype."""


@dataclass(frozen=True)
class Option:
    """Settings that a group of layers may get.

    settings: as `LobcqConfig.overrides` has them; None leaves the layers in float.
    bits: of a scalar of the weights, and of the activations. error: what they are expected to do to the results.
    """

    settings: Mapping[str, Any] | None
    bits: tuple[float, float]
    error: float = 0.0


@dataclass(frozen=True)
class Group:
    """Layers that get the same settings, since they read one activation or one weight.

    keys: what they share with others. free: no override of the settings names one of them, and all saw data.
    """

    matmuls: tuple[PlannedMatmul, ...]
    keys: frozenset[Any]
    free: bool

    @property
    def weights(self) -> tuple[PlannedWeight, ...]:
        """Each once."""
        return tuple(dict.fromkeys(one.weight for one in self.matmuls if one.weight is not None))

    @property
    def scalars(self) -> int:
        """Of its weights."""
        return sum(prod(weight.shape) for weight in self.weights)

    @property
    def multiply_adds(self) -> int:
        """With its weights, in the traced example; of one token where that cannot be said."""
        counted = ((one.multiply_adds, one.shape) for one in self.matmuls)
        return sum(prod(shape or ()) if number is None else number for number, shape in counted)


def spend(
    options: Sequence[Sequence[Option]], sizes: tuple[Sequence[int], Sequence[int]], limits: tuple[float, float]
) -> list[Option] | None:
    """The option of each group with which the errors' sum is smallest; None where nothing fits.

    Args:
        options: of each group, at least one.
        sizes: of each group, what its weights' bits and its activations' bits count for.
        limits: bits of weights and of activations, a scalar, on the average.
    """
    from scipy.optimize import LinearConstraint, milp  # half a second, which only a budget should take

    flat = [(group, one) for group, some in enumerate(options) for one in some]
    belongs = np.array([[float(group == index) for group, _ in flat] for index in range(len(options))])
    costs = [
        [counts[group] * one.bits[i] / (limits[i] * sum(counts)) for group, one in flat]
        for i, counts in enumerate(sizes)
    ]
    errors = np.array([one.error for _, one in flat])
    found = milp(
        errors / max(errors.max(), sys.float_info.min),
        integrality=np.ones(len(flat)),
        bounds=(0, 1),
        constraints=[LinearConstraint(belongs, 1, 1), LinearConstraint(np.array(costs), ub=1 + 1e-9)],
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        return None
    return [one for (_, one), taken in zip(flat, found.x, strict=True) if taken > 0.5]


def within_budget(
    graph_module: fx.GraphModule,
    plan: QuantizationPlan,
    config: LobcqConfig,
    calls: Sequence[Sequence[Any]],
    distance: Distance,
    progress: Progress | None = None,
) -> LobcqConfig:
    """Settings with an override for each layer in the place of a budget; a layer that saw no data keeps what it has.

    Args:
        graph_module: float, with observers that saw the calibration data.
        plan: of the settings, for that graph.
        config: with `bits`.
        calls: flat inputs of the graph, each run once for every group of layers.
        distance: of the graph's outputs from the float ones.
        progress: called as groups of layers are measured.

    Raises:
        ConfigError: the layers that overrides name, or the smallest formats, take more bits than there are.
    """
    statistics = observed(graph_module, plan)
    groups = _groups(plan, config, statistics)
    distances = _distances(graph_module, plan, groups, calls, distance, progress)
    weights = FloatWeights(graph_module)
    options = [_options(group, statistics, weights, moved) for group, moved in zip(groups, distances, strict=True)]
    assert config.bits is not None
    limits = (config.bits, _activation_limit(config))
    sizes = [group.scalars for group in groups], [group.multiply_adds for group in groups]
    taken = spend(options, sizes, limits)
    if taken is None:
        raise ConfigError(_too_few(options, sizes, limits))
    overrides, floats = {}, []
    for group, option in zip(groups, taken, strict=True):
        for name in dict.fromkeys(glob.escape(one.layer) for one in group.matmuls if group.free):
            if option.settings is None:
                floats.append(name)
            else:
                overrides[name] = option.settings
    return replace(
        config,
        bits=None,
        activation_bits=None,
        overrides={**overrides, **config.overrides},
        exclude=(*config.exclude, *floats),
    )


def _activation_limit(config: LobcqConfig) -> float:
    """The budget of activations: without one what weights have, or what the mode takes."""
    assert config.bits is not None
    if config.activation_bits is not None:
        return config.activation_bits
    return config.bits if config.mode == "w4a4" else _activation_bits(config.mode, config.activations)


def _activation_bits(mode: str, spec: FormatSpec) -> float:
    scales = 8 / spec.array_size
    return {"w4a4": spec.bits_per_scalar, "w4a8": 8 + scales, "w4a16": FLOAT_BITS}[mode]


def _groups(
    plan: QuantizationPlan, config: LobcqConfig, statistics: Mapping[PlannedMatmul, ActivationStatistics]
) -> list[Group]:
    groups: list[Group] = []
    for one in plan.quantized:
        assert one.weight is not None
        keys = frozenset((id(statistics[one]), one.layer, one.weight.source))
        joined = [group for group in groups if group.keys & keys]
        matmuls = (*(matmul for group in joined for matmul in group.matmuls), one)
        free = one.config is config and statistics[one].seen
        free = free and all(group.free for group in joined)
        merged = Group(matmuls, keys.union(*(group.keys for group in joined)), free)
        groups = [group for group in groups if group not in joined] + [merged]
    return groups


class _Rounded(PastObservers):
    """Runs a graph with the operands of some matmuls rounded."""

    def __init__(self, graph_module: fx.GraphModule, matmuls: Mapping[fx.Node, PlannedMatmul]) -> None:
        super().__init__(graph_module)
        self._matmuls = matmuls
        self._rounded: dict[PlannedWeight, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """A matmul of the group on rounded operands, anything else as it is."""
        if n not in self._matmuls:
            return super().run_node(n)
        planned = self._matmuls[n]
        (x, weight, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
        operands = rounded_activation(x, planned.config), self._weight(planned, weight)
        return super().call_function(n.target, (*operands, *rest), kwargs)

    def _weight(self, planned: PlannedMatmul, weight: Tensor) -> Tensor:
        key = planned.weight
        assert key is not None
        if key not in self._rounded:
            self._rounded[key] = rounded_operand(weight, planned.config.format)
        return self._rounded[key]


def rounded_operand(weight: Tensor, spec: FormatSpec) -> Tensor:
    """A weight as matmuls read it, [N, K] or of experts [E, K, N], rounded to the nearest along K."""
    if weight.dim() == 3:
        return torch.stack([rounded_weight(one, spec) for one in weight.mT]).mT.to(weight.dtype)
    return rounded_weight(weight, spec).to(weight.dtype)


def rounded_activation(x: Tensor, config: LobcqConfig) -> Tensor:
    """x [..., K] as a layer of these settings reads it, under a tensor scale for each row."""
    rows = x.reshape(-1, x.shape[-1])
    if config.mode == "w4a16" or not rows.numel():
        return x
    spec = config.activations
    encoded = encode_activation(rows, spec, config.mode, universal_codebooks(spec.num_codebooks))
    return decode_activation(encoded).reshape(x.shape).to(x.dtype)


def _distances(
    graph_module: fx.GraphModule,
    plan: QuantizationPlan,
    groups: Sequence[Group],
    calls: Sequence[Sequence[Any]],
    distance: Distance,
    progress: Progress | None,
) -> list[float]:
    """How far rounding each group alone moves the results, over all calls. One group's rounded weights are held."""
    nodes = {planned: matmul.node for matmul, planned in plan.pair(graph_module)}
    written, state = writes_inputs(graph_module.graph), state_of(graph_module)

    def run(interpreter: _Rounded, inputs: Sequence[Any]) -> Sequence[Any]:
        with kept(state), torch.inference_mode():
            outputs: Sequence[Any] = interpreter.run(*(one.clone() if written else one for one in inputs))
        return outputs

    plain = _Rounded(graph_module, {})
    expected, found = [run(plain, inputs) for inputs in calls], []
    for group in groups:
        if not group.free:
            found.append(0.0)  # nothing depends on it
            continue
        rounded = _Rounded(graph_module, {nodes[one]: one for one in group.matmuls})
        found.append(sum(distance(run(rounded, one), other) for one, other in zip(calls, expected, strict=True)))
        if progress is not None:
            progress(len(found), len(groups))
    return found


def _options(
    group: Group, statistics: Mapping[PlannedMatmul, ActivationStatistics], weights: FloatWeights, moved: float
) -> list[Option]:
    """What a group may get, with the distance of the results that is expected of it.

    Args:
        group: layers of the same settings.
        statistics: of what they read.
        weights: the float ones.
        moved: the distance, measured, in the settings that the group has.
    """
    config = group.matmuls[0].config
    if not group.free:
        return [Option(None, (config.format.bits_per_scalar, _activation_bits(config.mode, config.activations)))]
    pairs = [
        (statistics[one], partial(weights.matrices, one.weight)) for one in group.matmuls if one.weight is not None
    ]
    read: dict[ActivationStatistics, list[Tensor]] = {}
    for seen, matrices in pairs:
        read.setdefault(seen, []).append(column_power(seen, matrices))

    @cache
    def of_weights(spec: FormatSpec) -> float:
        return sum(weight_error(seen, matrices, spec) for seen, matrices in pairs)

    @cache
    def of_activation(mode: str, spec: FormatSpec) -> float:
        return sum(activation_error(seen, powers, spec, mode) for seen, powers in read.items())

    size, mode = config.format.array_size, config.mode
    formats = [FormatSpec(number, size) for number in CODEBOOKS]
    whole = all(one.columns % size == 0 for one in group.weights)  # else arrays have to be of one length
    lengths = [length for length in ALLOWED_ARRAY_SIZES if length == size or (whole and length < size)]
    found = [("w4a4", FormatSpec(n, length)) for length in lengths for n in CODEBOOKS] if mode == "w4a4" else []
    found += [("w4a8", config.format)] if mode != "w4a16" else []
    found += [("w4a16", config.format)]
    unit = moved / max(of_weights(config.format) + of_activation(mode, config.activations), 1e-300)
    return [
        Option(None, (FLOAT_BITS, FLOAT_BITS)),
        *(
            Option(
                _settings(spec, how, activations),
                (spec.bits_per_scalar, _activation_bits(how, activations)),
                unit * (of_weights(spec) + of_activation(how, activations)),
            )
            for spec, (how, activations) in product(formats, found)
        ),
    ]


def _settings(spec: FormatSpec, mode: str, activations: FormatSpec) -> dict[str, Any]:
    """As an override has them; an activation format only where it is another."""
    settings: dict[str, Any] = {"format": spec.name, "mode": mode}
    if mode == "w4a4":
        settings["activation_format"] = None if activations == spec else activations.name
    return settings


def _too_few(
    options: Sequence[Sequence[Option]], sizes: tuple[Sequence[int], Sequence[int]], limits: tuple[float, float]
) -> str:
    least = [
        sum(count * min(one.bits[i] for one in some) for count, some in zip(counts, options, strict=True)) / sum(counts)
        for i, counts in enumerate(sizes)
    ]
    return (
        f"bits={limits[0]:g} and activation_bits={limits[1]:g}: the least that these layers take, with what overrides"
        f" say, is {least[0]:.3f} and {least[1]:.3f}"
    )
