"""quantize(): a float model in, a model with LO-BCQ matmuls out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sized
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from lobcq_fx.calibration.fit import CodebookFit
from lobcq_fx.codebook_choice import choose_codebooks, fit_to_model
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CalibrationError, ConfigError, TraceError
from lobcq_fx.format import FormatSpec
from lobcq_fx.frontends.causal_lm import QuantizedCausalLM
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.static_cache_graph import StaticCacheGraph
from lobcq_fx.frontends.transformers_trace import is_causal_lm, trace_causal_lm, trace_pretrained
from lobcq_fx.graph.matmuls import find_matmuls
from lobcq_fx.inventory import Inventory, MatmulRecord
from lobcq_fx.kernels.bind import bind_cpu_core
from lobcq_fx.model import QuantizedModel
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.passes.infra import Sequential
from lobcq_fx.passes.insert_observers import InsertObservers
from lobcq_fx.passes.normalize_matmuls import NormalizeMatmuls
from lobcq_fx.passes.rewrite import Rewrite
from lobcq_fx.passes.share_activations import ShareActivations
from lobcq_fx.tracing.examples import calibration_inputs, call_of, without_labels
from lobcq_fx.tracing.trace import TracedModel, trace_module
from lobcq_fx.tracing.wrappers import unwrapped

logger = logging.getLogger(__name__)

LARGE_SHARE = 0.05
"""Of the model's bytes: weights left in float without being excluded are worth a warning from here on."""

Progress = Callable[[str, int, int | None], None]
"""Called with (step, done, total); total is None where it is not known."""


def quantize(
    model: nn.Module,
    calibration_data: Iterable[Any] | None = None,
    config: LobcqConfig | None = None,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    static_cache: bool = True,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize a model's matmuls to LO-BCQ.

    Args:
        model: any nn.Module, a Hugging Face encoder, or a Hugging Face decoder-only language model. Not changed, unless
            `inplace`; what stays in float shares its memory.
        calibration_data: model inputs, one call each: a tensor, a tuple of arguments, or a mapping of keyword arguments
            (a tokenizer's output, a DataLoader's batch). Not needed for the default settings.
        config: what to quantize and how; None means the defaults: W4A4, 4.5 bits a scalar, universal codebooks, a scale
            for each token.
        example_inputs: one call, in the same forms, to trace the model with. Hugging Face models need none; for others
            the first item of `calibration_data` serves if this is None.
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
        ConfigError: the settings leave nothing to quantize.
        LobcqError: a weight holds NaN or infinity.
    """
    config = config or LobcqConfig()
    report = progress or _silent
    if config.needs_calibration and calibration_data is None:
        raise CalibrationError("static scales and fitted codebooks need calibration_data: pass an iterable of inputs")
    model = unwrapped(model)
    bind_cpu_core()
    count, float_bytes = _size(model.parameters())
    traced = _trace_and_observe(model, calibration_data, config, example_inputs, report)
    static = _static_cache_graph(model, traced, static_cache)
    records = quantize_graph(traced.graph_module, config, report, release_from=model if inplace else None)
    if static is not None:
        static.quantize(config)
    saved = sum(record.float_bytes - record.packed_bytes for record in records)
    inventory = Inventory(records, count, float_bytes, float_bytes - saved)
    _warn_of_leftovers(inventory, config)
    return _build(model, traced, static, config, inventory)


def quantize_graph(
    graph_module: fx.GraphModule,
    config: LobcqConfig,
    progress: Progress | None = None,
    release_from: nn.Module | None = None,
) -> tuple[MatmulRecord, ...]:
    """Quantize a graph after `NormalizeMatmuls`, in place, with what its observers have seen if it has any.

    Args:
        graph_module: the graph.
        config: what to quantize and how.
        progress: called as weights are encoded.
        release_from: a module whose float weights are freed as they are encoded.

    Returns:
        What became of each matmul.

    Raises:
        ConfigError: the settings leave nothing to quantize.
        LobcqError: a weight holds NaN or infinity.
    """
    report = progress or _silent
    rewrite = Rewrite(
        config,
        choose_codebooks(graph_module, config, report),
        release_from=release_from,
        progress=lambda done, total: report("encode", done, total),
    )
    if not rewrite(graph_module).modified:
        raise ConfigError(f"nothing to quantize in the model: {_reasons(rewrite.records)}")
    Sequential((ShareActivations(), EliminateDeadCode()))(graph_module)
    return tuple(rewrite.records)


def fit_shared_codebooks(
    model: nn.Module,
    calibration_data: Iterable[Any],
    spec: FormatSpec,
    config: LobcqConfig | None = None,
    example_inputs: Any = None,
    *,
    progress: Progress | None = None,
) -> CodebookFit:
    """Fit one codebook set to a model's weights and activations, without quantizing it.

    The arguments are those of `quantize`; of the settings only those count that choose layers and scales. What comes
    out is what `quantize(..., LobcqConfig(codebooks="fitted"))` encodes with.

    Raises:
        TraceError, CalibrationError, ConfigError: as `quantize`.
    """
    config = replace(config or LobcqConfig(), format=spec)
    report = progress or _silent
    model = unwrapped(model)
    traced = _trace_and_observe(model, calibration_data, config, example_inputs, report)
    if not any(matmul.refusal is None for matmul in find_matmuls(traced.graph_module, config)):
        raise ConfigError(
            f"nothing to fit codebooks to in {type(model).__name__}: the settings leave every matmul alone"
        )
    return fit_to_model(traced.graph_module, config, spec, report)


def trace(model: nn.Module, example_inputs: Any = None) -> TracedModel:
    """Capture a model with the tracer that suits it.

    Raises:
        TraceError: the model cannot be captured, or needs example_inputs and has none.
    """
    model = unwrapped(model)
    if is_causal_lm(model):
        return trace_causal_lm(model)
    if isinstance(model, PreTrainedModel):
        return trace_pretrained(model, *(call_of(example_inputs) if example_inputs is not None else ((), None)))
    if example_inputs is None:
        raise TraceError(f"tracing {type(model).__name__} needs example_inputs: pass the arguments of one call")
    return trace_module(model, *call_of(example_inputs))


def _trace_and_observe(
    model: nn.Module, data: Iterable[Any] | None, config: LobcqConfig, example_inputs: Any, report: Progress
) -> TracedModel:
    """The model's normalized graph; with data, observers in it that have seen them."""
    if example_inputs is None and data is not None:
        example_inputs, data = _first(data)
        if isinstance(model, PreTrainedModel):
            example_inputs = without_labels(example_inputs)
    report("trace", 0, 1)
    traced = trace(model, example_inputs)
    NormalizeMatmuls()(traced.graph_module)
    report("trace", 1, 1)
    if data is not None:
        InsertObservers(config)(traced.graph_module)
        _calibrate(traced, data, report)
    return traced


def _silent(step: str, done: int, total: int | None) -> None:
    """Progress that nobody asked for."""


def _first(data: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first item, and the data with it still in front (a generator can be read only once)."""
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError("calibration_data is empty: pass at least one model input") from None
    return first, chain([first], iterator) if iterator is data else data


def _calibrate(traced: TracedModel, data: Iterable[Any], report: Progress) -> None:
    """Run the observed graph over the data; only statistics are kept."""
    total = len(data) if isinstance(data, Sized) else None
    device = next(iter(traced.graph_module.parameters())).device
    done = 0
    for done, item in enumerate(data, start=1):
        inputs = calibration_inputs(traced.calling, item, device)
        with torch.inference_mode():
            traced.graph_module(*inputs)
        report("calibrate", done, total)
    if done == 0:
        raise CalibrationError("calibration_data is empty: pass at least one model input")


def _static_cache_graph(model: nn.Module, traced: TracedModel, wanted: bool) -> StaticCacheGraph | None:
    """A language model's other graph; None for other models."""
    if not isinstance(traced.calling, CausalLMCall):
        return None
    assert isinstance(model, PreTrainedModel)
    return StaticCacheGraph(model, traced, wanted)


def _build(
    model: nn.Module, traced: TracedModel, static: StaticCacheGraph | None, config: LobcqConfig, inventory: Inventory
) -> QuantizedModel:
    if isinstance(traced.calling, CausalLMCall):
        assert isinstance(model, PreTrainedModel)
        assert static is not None
        return QuantizedCausalLM(
            traced.graph_module,
            traced.calling,
            config,
            inventory,
            model.config,
            model.generation_config,
            variants=static.variants,
            refused_variants=static.refused_variants,
        )
    hf_config = model.config if isinstance(model, PreTrainedModel) else None
    return QuantizedModel(traced.graph_module, traced.calling, config, inventory, hf_config)


def _size(parameters: Iterable[Tensor]) -> tuple[int, int]:
    """(scalars, bytes)."""
    sizes = [(p.numel(), p.numel() * p.element_size()) for p in parameters]
    return sum(n for n, _ in sizes), sum(b for _, b in sizes)


def _warn_of_leftovers(inventory: Inventory, config: LobcqConfig) -> None:
    """Say loudly which large weights stay in float although no pattern asked for it."""
    left = [r for r in inventory.left_alone if r.float_bytes and config.for_layer(r.layer).refusal(r.layer) is None]
    size = sum(record.float_bytes for record in left)
    if size > LARGE_SHARE * inventory.model_float_bytes:
        reasons = "; ".join(sorted({f"{record.layer}: {record.reason}" for record in left})[:3])
        share = size / inventory.model_float_bytes
        logger.warning("%.0f %% of the model's bytes stay in float, unasked: %s ...", 100 * share, reasons)


def _reasons(records: Iterable[MatmulRecord]) -> str:
    reasons = {f"{record.layer or record.operation}: {record.reason}" for record in records}
    return "; ".join(sorted(reasons)[:5]) or "the traced graph has no matmul"
