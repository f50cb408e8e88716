"""The calls that a language model's graphs are tried on: a prompt, padded on the left, and the step after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.float_causal_lm import as_named_by, cache_argument, counted, mask_of_step, new_cache, takes
from lobcq_fx.frontends.growing_cache import windowed_cache
from lobcq_fx.frontends.plain_outputs import plain_outputs
from lobcq_fx.frontends.static_cache_call import static_cache
from lobcq_fx.trial import Callee, Outcome, Trial

BATCH, PROMPT, PADDING = 2, 6, 2


def call_with(cache: Cache, callee: Callee, arguments: dict[str, Any]) -> Any:
    """What a float or a quantized model gives on a cache; the float one as plain as the other."""
    kept = {**arguments, "past_key_values": cache, "use_cache": True, "return_dict": True}
    if not isinstance(callee, PreTrainedModel):
        return callee(**kept)
    with plain_outputs(callee):
        return callee(**as_named_by(callee, kept))


def trial_cache(model: PreTrainedModel, calling: CausalLMCall) -> Cache:
    """An empty one, with layers that slide if the graph takes such."""
    return windowed_cache(calling.windows) if calling.windows else new_cache(model)


def growing(model: PreTrainedModel, calling: CausalLMCall) -> Trial:
    """With a cache that grows."""
    return _trial(model, lambda: trial_cache(model, calling))


def static(model: PreTrainedModel, calling: CausalLMCall) -> Trial:
    """With a cache of a fixed size."""
    return _trial(model, lambda: static_cache(model.config, calling, PROMPT + 3))


def _trial(model: PreTrainedModel, make_cache: Callable[[], Cache]) -> Trial:
    takes_positions = takes(model, "position_ids")
    ids = torch.arange(BATCH * (PROMPT + 1), dtype=torch.long, device=model.device).view(BATCH, PROMPT + 1) % 7
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    positions = counted(mask)

    def call(callee: Callee, cache: Cache, start: int, stop: int) -> Any:
        seen = mask_of_step(model, mask[:, :stop], start)
        tokens: dict[str, Any] = {"input_ids": ids[:, start:stop], "attention_mask": seen}
        if takes_positions:
            tokens["position_ids"] = positions[:, start:stop]
        return call_with(cache, callee, tokens)

    def run(callee: Callee) -> Outcome:
        prompt = call(callee, make_cache(), 0, PROMPT)
        real = prompt.logits[mask[:, :PROMPT].bool()]  # a padded position's logits mean nothing
        step = call(callee, getattr(prompt, cache_argument(model)), PROMPT, PROMPT + 1)
        return Outcome(type(prompt), (real, step.logits))

    return run
