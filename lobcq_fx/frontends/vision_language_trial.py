"""The call that graphs with images are tried on: a prompt with some, padded on the left, and the step after it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lobcq_fx.frontends.causal_lm_trial import call_with, trial_cache
from lobcq_fx.frontends.float_causal_lm import counted, takes
from lobcq_fx.frontends.output_types import CACHE_NAME
from lobcq_fx.frontends.vision_language_call import ImagesCall
from lobcq_fx.frontends.vision_language_trace import OTHER_COUNT, example_prompt
from lobcq_fx.trial import Callee, Outcome, Trial


def with_images(model: PreTrainedModel, calling: ImagesCall) -> Trial:
    """Positions of the prompt are left to the model."""
    with torch.no_grad():
        prompt = example_prompt(model, calling.vision.images, OTHER_COUNT)
    mask = prompt["attention_mask"]
    longer = torch.nn.functional.pad(mask, (0, 1), value=1)
    step = {"input_ids": prompt["input_ids"][:, -1:], "attention_mask": longer}
    if takes(model, "position_ids"):
        step["position_ids"] = counted(longer)[:, -1:]

    def run(callee: Callee) -> Outcome:
        first = call_with(trial_cache(model, calling), callee, prompt)
        after = call_with(getattr(first, CACHE_NAME), callee, step)
        return Outcome(type(first), (first.logits[mask.bool()], after.logits))

    return run
