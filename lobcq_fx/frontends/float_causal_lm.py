"""What a float causal language model does, found out by calling it: its cache, how it counts, and its loss."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.loss.loss_utils import ForCausalLMLoss

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.growing_cache import Windows
from lobcq_fx.frontends.output_types import CACHE_NAME, CACHE_PARAMS
from lobcq_fx.frontends.plain_outputs import FORM, plain_outputs
from lobcq_fx.frontends.recurrent_states import KNOWN, LayerStates

# Every size is different and at least 2: export bakes dimensions of 0 or 1 in and may identify equal ones.
BATCH, PAST, QUERY, KEPT, CACHE = 2, 5, 3, 2, 11

STATES = re.compile(r"^(?!use_|output_).*(cache|mems|state)")
"""Arguments that carry something from call to call."""

CACHE_REMEDY = (
    "Supported are models that cache plain keys and values [B, H, T, D], or states of convolutions and linear attention"
    " in the DynamicCache of transformers 5.23 or later. Remedy: wrap it in a"
    " torch.nn.Module that calls it with use_cache=False and returns the logits, and quantize that with example_inputs;"
    " or quantize its feed-forward blocks one by one"
)


def continuation(model: PreTrainedModel) -> tuple[dict[str, Any], Any]:
    """A call with QUERY tokens after PAST cached ones, one sequence padded on the left, and what the PAST ones gave.

    The cache is made of full layers even where the model slides a window, which the mask applies.

    Raises:
        TraceError: the model keeps a cache of another kind.
    """
    check_cache_layers(model)
    cache = new_cache(model)
    ids, mask = padded_prompt(model)
    prompt = {"input_ids": ids, "attention_mask": mask[:, :PAST], "past_key_values": cache}
    output = model(**as_named_by(model, prompt), use_cache=True, return_dict=True)
    _check_cache(model, output)
    inputs: dict[str, Any] = {"input_ids": ids[:, :QUERY], "attention_mask": mask_of_step(model, mask, PAST)}
    if takes(model, "position_ids"):
        inputs["position_ids"] = counted(mask)[:, -QUERY:]
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = torch.arange(QUERY - KEPT, QUERY, dtype=torch.long, device=model.device)
    inputs["past_key_values"] = cache
    return inputs, output


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache with the layers that the model fills, those with a window whole."""
    if not has_states(model):
        return DynamicCache()
    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicLayer() if type(one) is DynamicSlidingWindowLayer else one for one in cache.layers]
    return cache


def has_states(model: PreTrainedModel) -> bool:
    """Whether any layer of the model's cache is more than keys and values."""
    return any(type(one) not in (DynamicLayer, DynamicSlidingWindowLayer) for one in _own_layers(model))


def attends(model: PreTrainedModel) -> bool:
    """Whether any layer of the model keeps keys and values."""
    return any(isinstance(one, DynamicLayer) for one in _own_layers(model))


def windows_of(model: PreTrainedModel) -> Windows:
    """Those of the cache that the model's `generate()` makes; empty where no layer slides, or others keep states.

    Layers of several windows would hold different numbers of positions, and share a mask all the same.
    """
    windows = tuple(
        one.sliding_window if type(one) is DynamicSlidingWindowLayer else None for one in _own_layers(model)
    )
    (window, *others) = {one for one in windows if one is not None} or {0}
    return windows if window > 1 and not others and not has_states(model) else ()


def mask_of_step(model: PreTrainedModel, mask: Tensor, past: int) -> Tensor:
    """Of a mask [B, P + T] what a call of the T tokens after P takes: models without attention know of theirs alone."""
    return mask if attends(model) else mask[:, past:].contiguous()


def _own_layers(model: PreTrainedModel) -> list[Any]:
    return list(DynamicCache(config=model.config).layers)


def padded_prompt(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Ids [BATCH, PAST] and a mask [BATCH, PAST + QUERY] that hides the first two of the first row."""
    ids = torch.arange(BATCH * PAST, dtype=torch.long, device=model.device).view(BATCH, PAST) % 7
    mask = torch.ones((BATCH, PAST + QUERY), dtype=torch.long, device=model.device)
    mask[0, :2] = 0
    return ids, mask


def counted(mask: Tensor) -> Tensor:
    """Positions that count along a mask."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def default_positions(model: PreTrainedModel) -> dict[str, Any]:
    """How the model, called without position_ids, counts: along the mask (OPT does), or from 0 or 1 (PaliGemma) on.

    Returns:
        `positions_from_mask` and `first_position` of a `CausalLMCall`.
    """
    if not takes(model, "position_ids"):
        return {"positions_from_mask": False}
    ids, mask = (value[:1, :PAST] for value in padded_prompt(model))
    default = model(input_ids=ids, attention_mask=mask).logits[0, -1]
    index = torch.arange(PAST, dtype=torch.long, device=ids.device)[None]

    def distance(positions: Tensor) -> float:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1]
        return float((default - logits).abs().max())

    from_0 = distance(index)
    if from_0 == 0:  # nothing is nearer, and a call takes a pass through all weights
        return {"positions_from_mask": False, "first_position": 0}
    from_1, by_mask = distance(index + 1), distance(counted(mask))
    return {
        "positions_from_mask": by_mask < min(from_0, from_1),
        "first_position": int(from_1 < min(from_0, by_mask)),
    }


def has_shifted_loss(model: PreTrainedModel, vocab_size: int) -> bool:
    """Whether labels give the cross-entropy with the next token (BART's decoders shift nothing, experts may add to it).

    Of the model's configuration all counts that may add terms to the loss.
    """
    if not takes(model, "labels"):
        return False
    ids, _ = padded_prompt(model)
    with plain_outputs(model, FORM):
        output = model(input_ids=ids, labels=ids, use_cache=False, return_dict=True)
    expected = ForCausalLMLoss(output.logits, ids, vocab_size)
    return torch.allclose(output.loss.float(), expected.float(), rtol=1e-5, atol=1e-6)


def check_cache_layers(model: PreTrainedModel) -> None:
    """That the model's own cache is one of keys and values, or of states that are understood.

    Raises:
        TraceError: names what it keeps instead.
    """
    name, accepted = type(model).__name__, inspect.signature(model.forward).parameters
    known = {CACHE_NAME, "past_key_values", CACHE_PARAMS}
    states = [argument for argument in accepted if STATES.search(argument) and argument not in known]
    passed_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values()) and not states
    if not known & accepted.keys() and not passed_on:
        raise TraceError(f"{name} takes no past_key_values, but {', '.join(states) or 'no cache'}. {CACHE_REMEDY}")
    for layer in _own_layers(model):
        if type(layer) not in KNOWN:
            raise TraceError(f"{name} keeps a {type(layer).__name__} in its cache. {CACHE_REMEDY}")


def cache_argument(model: PreTrainedModel) -> str:
    """What the model calls its cache."""
    return next((name for name in (CACHE_NAME, CACHE_PARAMS) if takes(model, name)), "past_key_values")


def as_named_by(model: PreTrainedModel, call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with the cache under the name that the model has for it."""
    name = cache_argument(model)
    return {name if argument == "past_key_values" else argument: value for argument, value in call.items()}


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward names an argument."""
    return argument in inspect.signature(model.forward).parameters


def _check_cache(model: PreTrainedModel, output: Any) -> None:
    layers = getattr(getattr(output, cache_argument(model), None), "layers", None)
    try:
        kept = [LayerStates.of(layer) for layer in layers or ()]
    except TraceError as error:
        raise TraceError(f"{type(model).__name__}: {error}. {CACHE_REMEDY}") from None
    if not any(one.attends or one.fixed for one in kept):
        raise TraceError(f"{type(model).__name__} leaves nothing in its cache. {CACHE_REMEDY}")
