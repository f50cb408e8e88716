"""Language models whose layers are all alike, traced with a few of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.float_causal_lm import has_states, windows_of
from lobcq_fx.frontends.plain_outputs import configurations
from lobcq_fx.frontends.static_cache_call import STATIC_CACHE, StaticCacheCall
from lobcq_fx.frontends.transformers_trace import TRUSTED, trace_causal_lm, trace_static_cache
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.tracing.repeat import LAYERS, States, repeat_layers
from lobcq_fx.tracing.trace import MAIN, TracedModel

COUNT = "num_hidden_layers"

INDICES = ("layer_idx", "layer_id", "layer_index", "idx", "index")
"""What modules call the place of their layer, by which they find its states."""

PLAIN = (bool, int, float, str, type(None), tuple, list, dict, torch.dtype, torch.Size)
"""Attributes of modules that are compared by value; of others the types are."""


def trace_repeated(model: PreTrainedModel, *, static_cache: bool) -> dict[str, TracedModel]:
    """The graphs of a causal language model, of whose layers `LAYERS` are traced, and the others made of them.

    Args:
        model: of any size; while it is traced it has fewer layers.
        static_cache: whether to make a graph for static caches.

    Raises:
        TraceError: its layers are not alike, or not many; or as `trace_causal_lm` and `trace_static_cache`.
    """
    path, count = _layers_of(model)
    windows = windows_of(model)
    with _shortened(model, path):
        main = trace_causal_lm(model)
        short = main.calling
        assert isinstance(short, CausalLMCall)
        static = trace_static_cache(model, short) if static_cache else None
    heads = short.cache_heads[:1] * count
    if set(short.cache_heads) != set(heads):
        raise TraceError("its layers keep states of several sizes")
    states = States(first=len(short.inputs), each=2)
    calling = replace(short, cache_heads=heads, windows=windows if short.windows else ())
    graphs = {MAIN: TracedModel(repeat_layers(main.graph_module, path, count, states, model), calling)}
    if static is not None:
        assert isinstance(static.calling, StaticCacheCall)
        graph_module = repeat_layers(static.graph_module, path, count, states, model)
        graphs[STATIC_CACHE] = TracedModel(graph_module, replace(static.calling, causal=calling))
    return graphs


def _layers_of(model: PreTrainedModel) -> tuple[str, int]:
    """Path of the list of the model's layers, and how many there are.

    Raises:
        TraceError: there are few, or they differ in more than what their tensors hold.
    """
    count = getattr(model.config.get_text_config(), COUNT, 0)
    lists = [name for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if has_states(model) or count <= LAYERS + 1 or len(outer) != 1 or not type(model).__module__.startswith(TRUSTED):
        raise TraceError("it has no list of many layers, or is no model of transformers")
    layers = get_attribute(model, outer[0])
    tensors = [tensor for layer in layers for tensor in layer.parameters()]
    shared = len({id(one) for one in tensors}) < sum(len(list(layer.parameters())) for layer in layers)
    described = [_description(layer, place) for place, layer in enumerate(layers)]
    if shared or any(one != described[0] for one in described) or not _settings_alike(model, count):
        raise TraceError("its layers are not alike")
    return outer[0], count


def _description(module: nn.Module, place: int) -> Any:
    """What a module is, but for what its tensors hold and for the place of its layer."""
    own = vars(module)
    tensors = [
        (name, None if one is None else (type(one), tuple(one.shape), one.dtype))
        for kind in ("_parameters", "_buffers")
        for name, one in own[kind].items()
    ]
    attributes = [
        (name, repr(value) if isinstance(value, PLAIN) else type(value))
        for name, value in sorted(own.items())
        if not name.startswith("_") and not (name in INDICES and value == place)
    ]
    hooks = [len(own[kind]) for kind in ("_forward_hooks", "_forward_pre_hooks")]
    children = [(name, _description(one, place)) for name, one in module.named_children()]
    return type(module), tensors, attributes, hooks, children


def _settings_alike(model: PreTrainedModel, count: int) -> bool:
    """Whether no configuration says something of one layer that it does not say of others."""
    return all(
        len(Counter(map(repr, value))) == 1
        for config in configurations(model)
        for value in vars(config).values()
        if isinstance(value, (list, tuple)) and len(value) == count
    )


@contextmanager
def _shortened(model: PreTrainedModel, path: str) -> Iterator[None]:
    """Within, the model has its first layers alone, and its configurations say so."""
    owner, _, name = path.rpartition(".")
    parent, layers = get_attribute(model, owner) if owner else model, get_attribute(model, path)
    before = []
    for config in configurations(model):
        values = vars(config)
        key = getattr(config, "attribute_map", {}).get(COUNT, COUNT)
        if values.get(key) == len(layers):
            before.append((values, dict(values)))
            values |= {
                other: value[:LAYERS]
                for other, value in values.items()
                if isinstance(value, (list, tuple)) and len(value) == len(layers)
            }
            values[key] = LAYERS
    parent._modules[name] = nn.ModuleList(layers[:LAYERS])
    try:
        yield
    finally:
        parent._modules[name] = layers
        for values, old in before:
            values.clear()
            values.update(old)
