"""Traces that tests share: what takes most of a small model's time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from lobcq_fx.frontends.causal_lm_front_end import CausalLMFrontEnd
from lobcq_fx.frontends.encoder import EncoderFrontEnd
from lobcq_fx.frontends.seq2seq_front_end import Seq2SeqFrontEnd
from lobcq_fx.tracing.trace import TracedGraphs

TRACED: dict[tuple[object, ...], TracedGraphs] = {}


@contextmanager
def traced_once() -> Iterator[None]:
    """Models of one configuration with the same weights are traced once a process, unless an example matters."""
    traces = {one: one.trace for one in (CausalLMFrontEnd, EncoderFrontEnd, Seq2SeqFrontEnd)}

    def traced(self: Any, model: Any, example_inputs: Any, *, static_cache: bool) -> TracedGraphs:
        def trace() -> TracedGraphs:
            return traces[type(self)](self, model, example_inputs, static_cache=static_cache)

        if isinstance(self, EncoderFrontEnd) and example_inputs is not None:
            return trace()
        weights = hashlib.sha256()
        for value in model.state_dict().values():
            weights.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        key = (type(model), model.config.to_json_string(), model.dtype, static_cache, weights.digest())
        if key not in TRACED:
            TRACED[key] = trace()
        return copied(TRACED[key], model)

    with ExitStack() as stack:
        for one in traces:
            stack.enter_context(patch.object(one, "trace", traced))
        yield


def copied(traced: TracedGraphs, model: nn.Module) -> TracedGraphs:
    """A copy, whose weights are in a model's memory, as those of its own trace are."""
    found, own = deepcopy(traced), dict(model.named_parameters(remove_duplicate=False))
    for one in found.graph_modules.values():
        for name, parameter in one.named_parameters():
            parameter.data = own[name].data
    return found
