"""A traced graph against the float model it was traced from, on sizes that it was not traced with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.float_causal_lm import counted
from lobcq_fx.tracing.trace import TracedModel

ROWS, LENGTH = 3, 7

TOLERANCE = 0.1
"""Of the logits' spread, for the median difference: rounding stays far below it, a wrong mask or position far above."""


def default_positions_hold(model: PreTrainedModel, traced: TracedModel) -> bool:
    """Whether the graph agrees with the model in calls without position_ids.

    Raises:
        TraceError: nor does it with them.
    """
    if _agree(model, traced, {}):
        return True
    given = _positions(model, traced)
    if not given or not _agree(model, traced, given):
        raise TraceError(_message(model))
    return False


def _agree(model: PreTrainedModel, traced: TracedModel, given: dict[str, Tensor]) -> bool:
    """Whether a prompt and a step through a cache have the logits of one call of the model."""
    ids, mask = _example(model)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True, **given).logits
    calling, cache = traced.calling, None
    assert isinstance(calling, CausalLMCall)
    pieces = []
    for start, stop in ((0, LENGTH - 1), (LENGTH - 1, LENGTH)):
        call: dict[str, Any] = {name: value[:, start:stop] for name, value in {"input_ids": ids, **given}.items()}
        call |= {"attention_mask": mask[:, :stop], "past_key_values": cache}
        outputs = traced.graph_module(*calling.flatten((), call))
        output = calling.unflatten(outputs, (), call)
        cache = getattr(output, calling.cache_name)
        pieces.append(output.logits)
    seen = mask.bool()
    difference = (torch.cat(pieces, dim=1) - expected)[seen].abs().float().median()
    # Not a number where the weights are none: the error that names them comes later.
    return not bool(difference > TOLERANCE * expected[seen].float().std())


def _positions(model: PreTrainedModel, traced: TracedModel) -> dict[str, Tensor]:
    """position_ids for the example, where the graph takes them."""
    assert isinstance(traced.calling, CausalLMCall)
    return {"position_ids": counted(_example(model)[1])} if "position_ids" in traced.calling.inputs else {}


def _example(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ids = (torch.arange(ROWS * LENGTH, dtype=torch.long, device=model.device).view(ROWS, LENGTH) * 5 + 3) % 11
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def _message(model: PreTrainedModel) -> str:
    return (
        f"the traced graph gives other logits than {type(model).__name__} does, with a prompt and a step through a"
        " cache: what the model computes depends on something that the graph has no input for"
    )
