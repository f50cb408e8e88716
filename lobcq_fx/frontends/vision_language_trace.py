"""Capture a vision-language model: one graph of a whole call with images, and the parts that it is taken apart into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.causal_lm_trial import trial_cache
from lobcq_fx.frontends.float_causal_lm import KEPT, PAST, as_named_by, continuation, counted, takes
from lobcq_fx.frontends.image_features import features_of, image_inputs, traceable_images
from lobcq_fx.frontends.image_inputs import PIXELS, ImageInputs
from lobcq_fx.frontends.multimodal_positions import image_positions
from lobcq_fx.frontends.output_types import CACHE_NAME
from lobcq_fx.frontends.plain_outputs import plain_outputs
from lobcq_fx.frontends.transformers_trace import TRUSTED, export
from lobcq_fx.frontends.vision_language_call import (
    MODALITIES,
    TOKEN_TYPES,
    ImagesCall,
    VisionCall,
    WholeCall,
    feature_names,
)
from lobcq_fx.frontends.windowed_layers import sliding
from lobcq_fx.graph.shared_tensors import SharingGraphModule
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.tracing.assumptions import SizeDecisions
from lobcq_fx.tracing.part import part_of
from lobcq_fx.tracing.sizes import fixed_size
from lobcq_fx.tracing.trace import TracedModel, drop_constant_inputs, plain_graph_module, tracing
from lobcq_fx.trial import TRACED, TRACED_NARROW, WIDE

COUNT, OTHER_COUNT = 3, 2
"""In the example, and in the calls on which graph and model are compared."""

PADDING = 2

VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)

PREFIX = "vision_"
"""Of the vision graph's inputs while it is a part of the whole graph, which has position_ids of its own."""


def trace_vision_language(model: PreTrainedModel, causal: CausalLMCall) -> TracedModel:
    """One graph of a call with images, on an empty or a grown cache.

    Args:
        model: as `trace_causal_lm` has traced it.
        causal: how the graph of that trace is called.

    Raises:
        TraceError: it takes images in a way that is not served, or cannot be captured.
    """
    with tracing(model), torch.no_grad(), SizeDecisions(TRUSTED) as decisions:
        images = image_inputs(model)
        prompt = example_prompt(model, images, COUNT)
        vision = VisionCall(images, len(features_of(model, prompt)))
        token_type = _token_type(model)
        with plain_outputs(model):
            inputs = _continuation(model, causal, images, prompt)
            with sliding(model, inputs["past_key_values"], causal.windows), _tensors_of_images(model, images):
                graph_module = plain_graph_module(export(model, inputs, _dynamic_shapes(inputs)))
            drop_constant_inputs(graph_module, pytree.tree_leaves(inputs))
            _name_sizes(graph_module)
            EliminateDeadCode()(graph_module)  # layers of the vision tower behind the one that is read
        language = [name for name in inputs if not name.startswith(PREFIX) and name != "past_key_values"]
        pixels = len(images.names)
        guards = decisions.guards(graph_module).among(pixels + len(language) + 1)
        vision = VisionCall(images, vision.results, guards.among(pixels))
        for _ in range(pixels):
            guards = guards.without(0)
        calling = ImagesCall.of(
            causal,
            vision,
            inputs=(*feature_names(vision.results), *language),
            guards=guards.behind(vision.results),
            token_type=token_type,
        )
        traced = TracedModel(graph_module, WholeCall(vision, calling))
        _check(model, traced)
        parts_of(graph_module, traced.calling)  # refused before it is quantized
    return traced


def parts_of(graph_module: fx.GraphModule, whole: Any) -> dict[str, TracedModel]:
    """The vision graph, and that of the language model with images, on the tensors of a whole graph.

    Raises:
        TraceError: it cannot be taken apart.
    """
    assert isinstance(whole, WholeCall)
    graph, pixels = graph_module.graph, len(whole.vision.images.names)
    inputs, results = graph.find_nodes(op="placeholder"), graph.output_node().all_input_nodes
    features = results[-whole.vision.results :]
    graphs = (
        (whole.vision, part_of(graph, inputs[:pixels], features)),
        (whole.images, part_of(graph, [*features, *inputs[pixels:]], results[: -whole.vision.results])),
    )
    return {call.kind: TracedModel(SharingGraphModule(graph_module, part), call) for call, part in graphs}


def example_prompt(model: PreTrainedModel, images: ImageInputs, count: int) -> dict[str, Tensor]:
    """Two rows as a processor returns them, the first with one image and padded on the left, the other with the rest.

    Images are apart by a token, as processors have it.
    """
    call = images.example(count, model.device)
    shares = images.shares(call, features_of(model, call)[0].shape[:-1].numel())
    token = model.config.image_token_id
    rows = [[5, *_spread(shares[:1], token)], [3, *_spread(shares[1:], token), 6, 4]]
    length = max(map(len, rows)) + PADDING
    masks = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    rows = [[0] * (length - len(row)) + row for row in rows]
    ids, mask = (torch.tensor(one, dtype=torch.long, device=model.device) for one in (rows, masks))
    of_images = (ids == token).long()
    types = {name: of_images for name in (TOKEN_TYPES, MODALITIES) if takes(model, name)}
    return {"input_ids": ids, "attention_mask": mask, **types, **call}


def _spread(shares: list[int], token: int) -> list[int]:
    return [one for share in shares for one in (*[token] * share, 7)]


def _continuation(
    model: PreTrainedModel, causal: CausalLMCall, images: ImageInputs, prompt: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The prompt after PAST cached tokens, as the graph takes it."""
    before, _ = continuation(model)
    ids = prompt["input_ids"]
    mask = torch.cat((before["attention_mask"][:, :PAST], prompt["attention_mask"]), dim=1)
    tensors = images.tensors(prompt, ids.device)
    inputs: dict[str, Any] = {f"{PREFIX}{name}": one for name, one in zip(images.names, tensors, strict=True)}
    positions = image_positions(model.config, prompt)
    values = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": counted(mask)[:, PAST:] if positions is None else positions,
        "logits_to_keep": torch.arange(KEPT, dtype=torch.long, device=ids.device),
    }
    inputs |= {name: values[name] for name in causal.inputs}
    if takes(model, TOKEN_TYPES):
        inputs[TOKEN_TYPES] = torch.nn.functional.pad(prompt[TOKEN_TYPES], (PAST, 0))
    return inputs | {"past_key_values": before["past_key_values"]}


def _dynamic_shapes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Images and patches, batches and lengths; what is behind the first dimension of an image stays as it is."""
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            free = {0} if name.startswith(PREFIX) else {value.dim() - 1, max(value.dim() - 2, 0)}
            shapes[name] = {dim: Dim.AUTO if dim in free else Dim.STATIC for dim in range(value.dim())}
    layers = len(inputs["past_key_values"].layers)
    shapes["past_key_values"] = [{0: Dim.AUTO, 2: Dim.AUTO} for _ in range(2 * layers)]
    return shapes


def _name_sizes(graph_module: fx.GraphModule) -> None:
    """Write the sizes that are known in the place of -1, which stands for any where there are no images."""
    for node in graph_module.graph.nodes:
        if node.target in VIEWS and -1 in node.args[1]:
            place = node.args[1].index(-1)
            size = fixed_size(node.meta["val"].shape[place])
            if size is not None:
                node.args = (node.args[0], [*node.args[1][:place], size, *node.args[1][place + 1 :]])
    graph_module.recompile()


@contextmanager
def _tensors_of_images(model: PreTrainedModel, images: ImageInputs) -> Iterator[None]:
    """Within, the model's forward takes the vision graph's inputs, and returns logits, cache and image features."""
    original = model.forward

    def forward(**call: Any) -> Any:
        tensors = {name: call.pop(f"{PREFIX}{name}") for name in images.names}
        with traceable_images(model, images, tensors) as features:
            output = original(**call, **{PIXELS: tensors[PIXELS]})
        return output.logits, getattr(output, CACHE_NAME), *features

    model.forward = forward  # `tracing` puts back what was there
    try:
        yield
    finally:
        model.forward = original


def _token_type(model: PreTrainedModel) -> int | None:
    """Which token type, for every token, is the same to the model as none; None where there is no such."""
    if not takes(model, TOKEN_TYPES):
        return None
    ids = torch.arange(2 * PAST, dtype=torch.long, device=model.device).view(2, PAST) % 7
    expected = model(input_ids=ids).logits
    typed = (model(input_ids=ids, **{TOKEN_TYPES: torch.full_like(ids, kind)}).logits for kind in (0, 1))
    error, kind = min((_error(logits, expected), kind) for kind, logits in enumerate(typed))
    return kind if error < _tolerance(model) else None


def _check(model: PreTrainedModel, traced: TracedModel) -> None:
    """That the graph computes what the model does: text without an image, and a prompt with images after it.

    Raises:
        TraceError: it does not.
    """
    whole = traced.calling
    assert isinstance(whole, WholeCall)
    prompt = example_prompt(model, whole.vision.images, OTHER_COUNT)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    text = {"input_ids": ids[:, -PAST:] % 7, "attention_mask": torch.ones_like(ids[:, :PAST])}
    whole_mask = torch.cat((text["attention_mask"], mask), dim=1)
    positions = image_positions(model.config, prompt)
    given = {"attention_mask": whole_mask}
    if "position_ids" in whole.images.inputs:
        given["position_ids"] = counted(whole_mask)[:, PAST:] if positions is None else positions + PAST
    if TOKEN_TYPES in prompt:
        given[TOKEN_TYPES] = torch.nn.functional.pad(prompt[TOKEN_TYPES], (PAST, 0))
    cache, own = (trial_cache(model, whole.images) for _ in range(2))
    for call, seen in ((text, text["attention_mask"]), (prompt | given, mask)):
        expected = model(**as_named_by(model, {**call, "past_key_values": cache}), return_dict=True).logits
        call = {**call, "past_key_values": own}
        logits = whole.unflatten(traced.graph_module(*whole.flatten((), call)), (), call).logits
        error = _error(logits[seen.bool()], expected[seen.bool()])
        if not error < _tolerance(model):
            raise TraceError(
                f"the traced graph gives other logits than {type(model).__name__} does, for"
                f" {'a prompt with images' if call.get(PIXELS) is not None else 'text'}: they differ by"
                f" {100 * error:.3g} % (relative RMS)"
            )


def _tolerance(model: PreTrainedModel) -> float:
    """Relative RMS error of logits that rounding may explain."""
    return TRACED if model.dtype in WIDE else TRACED_NARROW


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())
