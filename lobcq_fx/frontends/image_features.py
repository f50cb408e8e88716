"""A float vision-language model's image features as a traced graph computes them, of any number of images at once.

The tower is the model's own. What stands in for its methods while it is traced decides nothing by values: that was
done by `image_inputs`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.image_inputs import PIXELS, FixedImages, ImageInputs, ImagePatches, ImageTiles
from lobcq_fx.frontends.saved_config import config_of_class

FEATURES = "get_image_features"

PERMUTE, DEEPSTACK = "permute_input_for_window_attn", "_deepstack_process"

OPTIONAL = ("vision_feature_layer", "vision_feature_select_strategy", "output_hidden_states", "image_sizes")
"""Arguments of `get_image_features` that its models serve without."""


def image_inputs(model: PreTrainedModel) -> ImageInputs:
    """How a model takes images.

    Raises:
        TraceError: in a way that is not served.
    """
    inner, name = model.base_model, type(model).__name__
    if getattr(model.config, "image_token_id", None) is None or not hasattr(inner, FEATURES):
        raise TraceError(f"{name} has no {FEATURES} and image_token_id, by which images become a part of a prompt")
    parameters = inspect.signature(getattr(inner, FEATURES)).parameters
    named = [one for one in parameters.values() if one.kind is not one.VAR_KEYWORD]
    needed = {one.name for one in named if one.name not in OPTIONAL or one.default is one.empty}
    for kind in (FixedImages, ImageTiles, ImagePatches):
        if needed == set(kind.arguments):
            return kind(config_of_class(model), model.dtype)
    raise TraceError(f"{name} takes images by {', '.join(sorted(needed))}, which is not served")


def features_of(model: PreTrainedModel, call: Mapping[str, Tensor]) -> list[Tensor]:
    """What the float model makes of a call's images: features [L, D], then those for each layer that gets some."""
    names = inspect.signature(getattr(model.base_model, FEATURES)).parameters
    output = getattr(model.base_model, FEATURES)(**{one: call[one] for one in names if one in call})
    return _flat(output)


@contextmanager
def traceable_images(
    model: PreTrainedModel, inputs: ImageInputs, tensors: Mapping[str, Tensor]
) -> Iterator[list[Tensor]]:
    """Within, the model's forward makes its image features of a vision graph's inputs; yields where they are put."""
    inner, found = model.base_model, list[Tensor]()
    original = getattr(inner, FEATURES)
    compute = {FixedImages: _fixed, ImageTiles: _tiles, ImagePatches: _patches}[type(inputs)]

    def get_image_features(*_: Any, **__: Any) -> Any:
        output = compute(inner, original, tensors)
        listed = isinstance(output.pooler_output, (list, tuple))
        found.extend(_flat(output))
        if listed:
            output.pooler_output = [found[0]]
        if len(found) > 1:
            output.deepstack_features = [[one] for one in found[1:]]
        return output

    with ExitStack() as stack:
        stack.enter_context(_without_decisions(inner))
        stack.enter_context(_replaced(inner, FEATURES, get_image_features))
        for module in inner.visual.modules() if isinstance(inputs, ImagePatches) else ():
            if hasattr(module, "qkv"):
                stack.enter_context(_replaced(module, "forward", _segmented(module)))
        if hasattr(getattr(inner, "language_model", None), DEEPSTACK):
            stack.enter_context(_replaced(inner.language_model, DEEPSTACK, _add_where))
        yield found


def _flat(output: Any) -> list[Tensor]:
    pooled, layers = output.pooler_output, getattr(output, "deepstack_features", None) or ()
    return [torch.cat(list(one), dim=0) if isinstance(one, (list, tuple)) else one for one in (pooled, *layers)]


def _fixed(inner: nn.Module, original: Any, tensors: Mapping[str, Tensor]) -> Any:
    output = original(tensors[PIXELS], return_dict=True)
    if isinstance(output.pooler_output, list):
        output.pooler_output = [output.pooler_output[0].flatten(0, 1)]
    return output


def _tiles(inner: Any, original: Any, tensors: Mapping[str, Tensor]) -> Any:
    output = inner.vision_model(**tensors, return_dict=True)
    output.pooler_output = [inner.connector(output.last_hidden_state).flatten(0, 1)]
    return output


def _patches(inner: Any, original: Any, tensors: Mapping[str, Tensor]) -> Any:
    given = dict(tensors)
    pixels, given["cu_seqlens"], rows = given.pop(PIXELS), given.pop("segments"), given.pop("window_rows", None)
    with ExitStack() as stack:
        if rows is not None:
            given["cu_window_seqlens"] = given.pop("window_segments")
            stack.enter_context(_replaced(inner.visual, PERMUTE, lambda x, *_, **__: x[rows]))
        output = inner.visual(pixels, grid_thw=None, return_dict=True, **given)
    output.pooler_output = [output.pooler_output]
    return output


def _segmented(module: Any) -> Any:
    """The forward of a vision attention in which a patch sees its own segment, by a mask instead of a loop."""
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision

    def forward(hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **_: Any) -> Tensor:
        length = hidden_states.shape[0]
        query, key, value = module.qkv(hidden_states).reshape(length, 3, module.num_heads, -1).permute(1, 0, 2, 3)
        query, key = rotate(query, key, *position_embeddings)
        query, key, value = (one.transpose(0, 1).unsqueeze(0) for one in (query, key, value))
        own = (cu_seqlens[:, None] == cu_seqlens[None, :])[None, None]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=own, scale=module.scaling)
        projected: Tensor = module.proj(attended.squeeze(0).transpose(0, 1).reshape(length, -1))
        return projected

    return forward


def _add_where(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    """Add features to the hidden states of image tokens, without an index whose size depends on values."""
    added = torch.zeros_like(hidden_states).masked_scatter(visual_pos_masks[..., None], visual_embeds)
    return hidden_states + added


class _ListType(type):
    """What `list` is in a model's module meanwhile: of a tensor it makes a list with that alone."""

    def __call__(cls, *values: Any) -> Any:
        return [values[0]] if values and isinstance(values[0], Tensor) else list(*values)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, list)


class _OneBatch(metaclass=_ListType):
    pass


@contextmanager
def _without_decisions(inner: nn.Module) -> Iterator[None]:
    """Within, a batch of images stays one (a list of it would fix their number), and nobody counts image tokens.

    Masks are expanded by broadcasting, as those are that transformers composes without functions; `torch.vmap`, which
    it uses with them, gives the same, in a graph of its own.
    """
    names = vars(sys.modules[type(inner).__module__])
    own = {"list": _OneBatch, "torch_compilable_check": lambda *_, **__: None}
    before = {name: names[name] for name in own if name in names}
    masks = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "eager")}
    names.update(own)
    for name, make in masks.items():
        ALL_MASK_ATTENTION_FUNCTIONS[name] = _broadcast(make)
    try:
        yield
    finally:
        for name, make in masks.items():
            ALL_MASK_ATTENTION_FUNCTIONS[name] = make
        for name in own:
            del names[name]
        names.update(before)


def _broadcast(make: Any) -> Any:
    def mask(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **{**kwargs, "use_vmap": False})

    return mask


@contextmanager
def _replaced(owner: nn.Module, name: str, function: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    vars(owner)[name] = function
    try:
        yield
    finally:
        if before is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before
