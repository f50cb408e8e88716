"""Positions in time, height and width (M-RoPE), by the rule of the model's own class in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.output_types import CACHE_NAME

RULE = "compute_3d_position_ids"


def without_weights(config: Any) -> Any:
    """The model's base class without a single module: for its rules, which read the configuration alone.

    None where it has no rule for positions.
    """
    found = AutoModel._model_mapping.get(type(config), None)
    if not hasattr(found, RULE):
        return None
    inner = found.__new__(found)
    nn.Module.__init__(inner)
    inner.config, inner.rope_deltas = config, None
    return inner


def image_positions(config: Any, call: Mapping[str, Any]) -> Tensor | None:
    """Those of a prompt with images, [3, B, T]; None where the model counts as any language model does."""
    inner = without_weights(config)
    return None if inner is None else positions_by(inner, call)


def positions_by(inner: Any, call: Mapping[str, Any]) -> Tensor | None:
    """What `inner` gives a call, as a step after those it has seen; None where it counts from 0 on.

    Raises:
        CallError: something that the rule needs is missing.
    """
    ids = call["input_ids"]
    try:
        positions: Tensor | None = getattr(inner, RULE)(
            input_ids=ids,
            inputs_embeds=ids[..., None],
            image_grid_thw=call.get("image_grid_thw"),
            video_grid_thw=None,
            attention_mask=call.get("attention_mask"),
            **{CACHE_NAME: call.get("past_key_values")},
            mm_token_type_ids=call.get("mm_token_type_ids"),
        )
    except (StopIteration, ValueError) as error:
        reason = str(error) or "input_ids has more images than the call"
        raise CallError(f"position_ids cannot be counted: {reason}") from None
    # With cached tokens, those of the whole mask.
    return None if positions is None else positions[..., -ids.shape[1] :]


def rows_of_positions(positions: Tensor) -> Tensor:
    """Of positions [4, B, T], whose first row is the text's, those that the rotations read; of fewer all."""
    return positions[-3:]
