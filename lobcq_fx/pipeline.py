"""quantize(): a float model in, a model with LO-BCQ matmuls out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, fx, nn

from lobcq_fx.budget import MEASURED_CALLS, OBSERVED_CALLS, within_budget
from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.codebook_choice import ModelFit, choose_codebooks, fit_to_model, given_codebooks
from lobcq_fx.config import CALIBRATED, LobcqConfig
from lobcq_fx.encoding import EncodedWeight, encode_weights, left_alone, records_of, register_static_scales
from lobcq_fx.errors import CalibrationError, ConfigError, TraceError
from lobcq_fx.format import FormatSpec
from lobcq_fx.frontends import front_end_of
from lobcq_fx.frontends.base import FrontEnd
from lobcq_fx.frontends.tried import Tried
from lobcq_fx.graph.attributes import device_of
from lobcq_fx.graph.graph_module import LobcqGraphModule, copied
from lobcq_fx.graph.shared_tensors import drop_shared, share
from lobcq_fx.inventory import MatmulRecord
from lobcq_fx.kernels.bind import bind_cpu_core
from lobcq_fx.leftovers import inventory_of
from lobcq_fx.model import QuantizedModel
from lobcq_fx.observation import SEGMENT, Observed, observe
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.passes.order import NORMALIZE, emitting
from lobcq_fx.plan import PlannedMatmul, PlannedWeight, QuantizationPlan
from lobcq_fx.preparation import Preparation
from lobcq_fx.tracing.autocast import no_autocast
from lobcq_fx.tracing.examples import calibration_inputs
from lobcq_fx.tracing.progress import counted_calls
from lobcq_fx.tracing.trace import MAIN, TracedModel
from lobcq_fx.tracing.wrappers import unwrapped

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
"""Called with (step, done, total); total is None where it is not known."""


@no_autocast()
def quantize(
    model: nn.Module,
    calibration_data: Iterable[Any] | None = None,
    config: LobcqConfig | None = None,
    example_inputs: Any = None,
    *,
    recipe: str | None = None,
    inplace: bool = False,
    static_cache: bool = True,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize a model's matmuls to LO-BCQ.

    Args:
        model: any nn.Module, a Hugging Face encoder, decoder-only language model, with or without images, or
            encoder-decoder that generates. Not changed, unless `inplace`; what stays in float shares its memory.
        calibration_data: model inputs, one call each: a tensor, a tuple of arguments, or a mapping of keyword arguments
            (a tokenizer's output, a DataLoader's batch). Not needed for the default settings.
        config: what to quantize and how; None means the defaults: W4A4, 4.5 bits a scalar, universal codebooks, a scale
            for each token.
        example_inputs: one call, in the same forms, to trace the model with. Hugging Face models need none; for others
            the first item of `calibration_data` serves if this is None.
        recipe: `"fast"`, `"balanced"` or `"best"`, in the place of `config`: `LobcqConfig.of_recipe(recipe)`.
        inplace: free each float weight as soon as it is encoded, so that the peak stays below the float model plus one
            layer. `model` is unusable afterwards.
        static_cache: trace a language model once more, so that it takes static caches too; False saves that time.
        progress: called as the work goes on.

    Returns:
        A module that is called as `model` was; for a language model one that also has `generate()`.

    Raises:
        TraceError: the model cannot be captured as one graph (names the module and the source line).
        CalibrationError: the settings need data and there are none, or a layer never saw any.
        CallError: an item of calibration_data, or example_inputs, is no call that the model or its graph takes.
        ConfigError: the settings leave nothing to quantize, or are not for this kind of model.
        LobcqError: a weight holds NaN or infinity.
    """
    config = settings_of(config, recipe)
    report = progress or silent
    if config.needs_calibration and calibration_data is None:
        raise CalibrationError(f"{CALIBRATED} need calibration_data: pass an iterable of inputs")
    model = unwrapped(model)
    example_inputs, data = example_and_data(front_end_of(model), example_inputs, calibration_data)
    size = size_of(model.parameters())
    planned = trace_and_plan(model, config, example_inputs, static_cache=static_cache, report=report)
    tried, plan, main = planned.tried, planned.plan, planned.tried.traced.graphs[MAIN]
    unlike = planned.unlike
    if config.bits is not None:
        data = list(data or ())
        config = _decided(main, plan, config, tried.front_end, data, report)
        plan, others = _planned(tried.traced.graph_modules, config, planned.roles, tried.traced.optional)
        unlike = {**tried.unlike, **others}
    calls = None if data is None else Calls(main, data)
    alike = tried.graphs_without(unlike)
    emitted, records = quantize_graphs(alike, plan, config, calls, report, model if inplace else None)
    inventory = inventory_of(records, *size)
    return tried.build(tried.parts(emitted, unlike, config, inventory))


@dataclass(frozen=True)
class Planned:
    """A model whose graphs were traced, compared with it, and planned.

    unlike: why a graph besides the main one is not to go on, by name. roles: what layers are to the model.
    """

    tried: Tried
    plan: QuantizationPlan
    unlike: dict[str, str]
    roles: Mapping[str, str]


def trace_and_plan(
    model: nn.Module, config: LobcqConfig, example_inputs: Any, *, static_cache: bool, report: Progress
) -> Planned:
    """The first half of quantizing a model, for which its weights need not be its own.

    Raises:
        TraceError, CallError, ConfigError: as `quantize`.
    """
    bind_cpu_core()
    front_end = front_end_of(model)
    refusal = front_end.refusal(model, config)
    if refusal is not None:
        raise ConfigError(refusal)
    with counted_calls(model, partial(report, "trace")):
        tried = Tried.by_tracing(front_end, model, example_inputs, static_cache=static_cache)
    traced = tried.traced
    roles = front_end.roles(model)
    plan, others = make_plan(traced.graph_modules, config, roles, traced.optional)
    return Planned(tried, plan, {**tried.unlike, **others}, roles)


def make_plan(
    graph_modules: Mapping[str, fx.GraphModule],
    config: LobcqConfig,
    roles: Mapping[str, str] | None = None,
    optional: frozenset[str] = frozenset(),
) -> tuple[QuantizationPlan, dict[str, str]]:
    """Normalize the traced graphs of a model, and decide what becomes of their matmuls.

    Args:
        graph_modules: by name, `MAIN` among them, changed in place: the others let go of the tensors that it has too.
        config: what to quantize and how.
        roles: module path -> what that layer is to the model.
        optional: paths of modules that graphs beside the main one may leave out.

    Returns:
        The plan, and why it does not hold for a graph that runs other matmuls than the main one, by name.

    Raises:
        ConfigError: the settings leave nothing to quantize.
    """
    for graph_module in graph_modules.values():
        NORMALIZE(graph_module)
    plan, unlike = _planned(graph_modules, config, roles, optional)
    for name, graph_module in graph_modules.items():
        if name != MAIN:
            drop_shared(graph_module, graph_modules[MAIN])
    return plan, unlike


def _planned(
    graph_modules: Mapping[str, fx.GraphModule],
    config: LobcqConfig,
    roles: Mapping[str, str] | None,
    optional: frozenset[str],
) -> tuple[QuantizationPlan, dict[str, str]]:
    """The same of graphs that are normalized."""
    plan = QuantizationPlan.of(graph_modules[MAIN], config, roles, optional)
    if not plan.quantized:
        raise ConfigError(f"nothing to quantize in the model: {_reasons(plan)}")
    unlike: dict[str, str] = {}
    for name, graph_module in graph_modules.items():
        try:
            plan.pair(graph_module)
        except TraceError as error:
            logger.warning("the quantized model will have no %s graph: %s", name, error)
            unlike[name] = str(error)
    return plan, unlike


def _decided(
    traced: TracedModel,
    plan: QuantizationPlan,
    config: LobcqConfig,
    front_end: FrontEnd,
    data: Sequence[Any],
    report: Progress,
) -> LobcqConfig:
    """The settings with a mode and formats for each layer in the place of a budget of bits."""
    graph_module = LobcqGraphModule(traced.graph_module, copied(traced.graph_module.graph))
    observe(graph_module, plan, Calls(traced, data[:OBSERVED_CALLS]), partial(report, "calibrate"))
    calls = list(Calls(traced, data[:MEASURED_CALLS]))
    return within_budget(graph_module, plan, config, calls, front_end.distance, partial(report, "weigh layers"))


def quantize_graphs(
    graph_modules: Mapping[str, fx.GraphModule],
    plan: QuantizationPlan,
    config: LobcqConfig,
    calls: Iterable[Sequence[Any]] | None = None,
    progress: Progress | None = None,
    release_from: nn.Module | None = None,
) -> tuple[dict[str, fx.GraphModule], tuple[MatmulRecord, ...]]:
    """Observe the main graph where there are calls of it, encode what is planned, and emit every graph.

    Args:
        graph_modules: after `make_plan`, by name.
        plan: theirs.
        config: which codebooks to encode with.
        calls: flat inputs of the main graph, one sequence for each call; None observes nothing.
        progress: called as the work goes on.
        release_from: a module whose float weights are freed as they are encoded.

    Returns:
        The emitted graphs, all on the tensors of the main one, which is changed in place; what became of each matmul.

    Raises:
        LobcqError: a weight holds NaN or infinity.
        CalibrationError: a layer that needs calibration data saw none, or there is no call.
    """
    assert calls is not None or not plan.compensates, "second moments are needed: pass calls of the main graph"
    report, root = progress or silent, graph_modules[MAIN]
    preparation = Preparation(plan, graph_modules)
    observing = partial(report, "calibrate")
    seen: Iterable[Observed] = [Observed.nothing(plan)]
    decided = None
    if config.codebooks == "fitted":  # to all layers, before the first is encoded
        calls = list(calls or ())
        again = preparation.observation(SEGMENT) if plan.compensates else None
        (whole,) = preparation.observation().run(calls, moments=False, progress=observing)
        decided = preparation(whole.statistics)
        codebooks = choose_codebooks(plan, decided.weights.matrices, decided.statistics, config, report)
        if again is not None:
            seen = again.run(calls, moments=True, progress=observing)
    else:
        codebooks = given_codebooks(config, plan.formats)
        if calls is not None:
            observation = preparation.observation(SEGMENT if plan.compensates else None)
            seen = observation.run(calls, moments=True, progress=observing)
    records: dict[PlannedMatmul, MatmulRecord] = {}
    encoded: dict[PlannedWeight, EncodedWeight] = {}
    rotated: set[PlannedMatmul] = set()
    for part in seen:
        prepared = decided or preparation(part.statistics)
        moments = part.moments(prepared.statistics)
        counted = _counted(report, len(encoded), len(plan.weights))
        encoded |= encode_weights(part.plan, prepared.weights, codebooks, moments, release_from, counted)
        register_static_scales(part.plan, root, prepared.statistics)
        found = records_of(part.plan, encoded, codebooks, prepared.statistics, prepared.smoothed, prepared.rotated)
        records |= zip(part.plan.matmuls, found, strict=True)
        rotated |= prepared.rotated
    emitted = emit_graphs(graph_modules, plan, codebooks, rotated)
    return emitted, tuple(records.get(one) or left_alone(one) for one in plan.matmuls)


def _counted(report: Progress, before: int, total: int) -> Callable[[int, int], None]:
    """Progress of encoding, of which some is done before."""
    return lambda done, _: report("encode", before + done, total)


def emit_graphs(
    graph_modules: Mapping[str, fx.GraphModule],
    plan: QuantizationPlan,
    codebooks: CodebookSets,
    rotated: AbstractSet[PlannedMatmul] = frozenset(),
) -> dict[str, fx.GraphModule]:
    """Write the ops of the format into every graph, on the tensors of the main one, which has the packed weights."""
    root = graph_modules[MAIN]
    emitted = {name: root if name == MAIN else share(one, root) for name, one in graph_modules.items()}
    for graph_module in emitted.values():
        emitting(plan, codebooks, rotated)(graph_module)
    EliminateDeadCode(tuple(one for one in emitted.values() if one is not root))(root)
    return emitted


@no_autocast()
def fit_shared_codebooks(
    model: nn.Module,
    calibration_data: Iterable[Any],
    spec: FormatSpec,
    config: LobcqConfig | None = None,
    example_inputs: Any = None,
    *,
    progress: Progress | None = None,
) -> ModelFit:
    """Fit one codebook set to a model's weights and activations, without quantizing it, and judge it.

    The arguments are those of `quantize`; of the settings only those count that choose layers and scales. What comes
    out is what `quantize(..., LobcqConfig(codebooks="fitted"))` encodes with.

    Raises:
        TraceError, CalibrationError, ConfigError: as `quantize`.
    """
    config = replace(config or LobcqConfig(), format=spec)
    config.require_decided()
    report = progress or silent
    model = unwrapped(model)
    front_end = front_end_of(model)
    example_inputs, data = example_and_data(front_end, example_inputs, calibration_data)
    with counted_calls(model, partial(report, "trace")):
        traced = front_end.trace(model, example_inputs, static_cache=False)
    plan, _ = make_plan(traced.graph_modules, config, front_end.roles(model), traced.optional)
    preparation = Preparation(plan, traced.graph_modules)
    calls = Calls(traced.graphs[MAIN], data or ())
    (whole,) = preparation.observation().run(calls, moments=False, progress=partial(report, "calibrate"))
    prepared = preparation(whole.statistics)
    return fit_to_model(plan, prepared.weights.matrices, prepared.statistics, spec, report)


def settings_of(config: LobcqConfig | None, recipe: str | None) -> LobcqConfig:
    """The settings, or those of a recipe.

    Raises:
        ConfigError: both are given, or there is no such recipe.
    """
    if recipe is None:
        return config or LobcqConfig()
    if config is not None:
        raise ConfigError(f"pass config or recipe, not both: LobcqConfig.of_recipe({recipe!r}, mode=...) has settings")
    return LobcqConfig.of_recipe(recipe)


def silent(step: str, done: int, total: int | None) -> None:
    """Progress that nobody asked for."""


def example_and_data(
    front_end: FrontEnd, example_inputs: Any, data: Iterable[Any] | None
) -> tuple[Any, Iterable[Any] | None]:
    """The example, without one the first item of the data; and the data, whole (a generator can be read only once)."""
    if example_inputs is not None or data is None:
        return example_inputs, data
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError("calibration_data is empty: pass at least one model input") from None
    return front_end.example_of(first), chain([first], iterator) if iterator is data else data


@dataclass(frozen=True)
class Calls:
    """Flat inputs of a graph, made of calls of its model."""

    traced: TracedModel
    data: Iterable[Any]

    def __iter__(self) -> Iterator[list[Any]]:
        device = device_of(self.traced.graph_module)
        return (calibration_inputs(self.traced.calling, item, device) for item in self.data)

    def __length_hint__(self) -> int:
        return len(self.data) if isinstance(self.data, Sized) else NotImplemented


def size_of(parameters: Iterable[Tensor]) -> tuple[int, int]:
    """(scalars, bytes)."""
    sizes = [(p.numel(), p.numel() * p.element_size()) for p in parameters]
    return sum(n for n, _ in sizes), sum(b for _, b in sizes)


def _reasons(plan: QuantizationPlan) -> str:
    reasons = {f"{matmul.layer or matmul.operation}: {matmul.refusal}" for matmul in plan.matmuls}
    return "; ".join(sorted(reasons)[:5]) or "the traced graph has no matmul"
