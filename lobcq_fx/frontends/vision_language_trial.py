"""The call that graphs with images are tried on: a prompt with some, padded on the left, and the step after it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lobcq_fx.frontends.float_causal_lm import as_named_by, counted, new_cache, takes
from lobcq_fx.frontends.image_inputs import ImageInputs
from lobcq_fx.frontends.output_types import CACHE_NAME
from lobcq_fx.frontends.plain_outputs import plain_outputs
from lobcq_fx.frontends.vision_language_trace import OTHER_COUNT, example_prompt
from lobcq_fx.trial import Callee, Outcome, Trial


def with_images(model: PreTrainedModel, images: ImageInputs) -> Trial:
    """Positions of the prompt are left to the model."""
    with torch.no_grad():
        prompt = example_prompt(model, images, OTHER_COUNT)
    mask = prompt["attention_mask"]
    longer = torch.nn.functional.pad(mask, (0, 1), value=1)
    step = {"input_ids": prompt["input_ids"][:, -1:], "attention_mask": longer}
    if takes(model, "position_ids"):
        step["position_ids"] = counted(longer)[:, -1:]

    def call(callee: Callee, given: dict[str, Any], cache: Any) -> Any:
        kept = {**given, "past_key_values": cache, "use_cache": True, "return_dict": True}
        if callee is not model:
            return callee(**kept)
        with plain_outputs(model):
            return model(**as_named_by(model, kept))

    def run(callee: Callee) -> Outcome:
        first = call(callee, prompt, new_cache(model))
        after = call(callee, step, getattr(first, CACHE_NAME))
        return Outcome(type(first), (first.logits[mask.bool()], after.logits))

    return run
