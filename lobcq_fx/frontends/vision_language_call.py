"""How a vision-language model is called with images: a graph of the whole call, and the two parts that serve it.

whole     the vision graph's inputs, and those of a language model with its cache -> logits, grown cache, features
vision    the vision graph's inputs -> image features [L, D], and those for the language model's first layers
images    features, and what a language model takes -> logits and the grown cache; with L = 0 it serves text, too

The features of a call's images stand, in the order of its tokens, where `input_ids` has the image token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.causal_lm_call import CACHE_DTYPES, CausalLMCall, call_arguments, input_ids_of
from lobcq_fx.frontends.growing_cache import tokens_in
from lobcq_fx.frontends.image_inputs import KINDS, PIXELS, ImageInputs, described
from lobcq_fx.frontends.multimodal_positions import image_positions, rows_of_positions
from lobcq_fx.tracing.calling import CallingConvention
from lobcq_fx.tracing.guards import SizeGuards

IMAGES = "images"
"""Name of the graph that serves prompts with images."""

FEATURES = "image_features"
"""What a call has in the place of pixels: a list of the vision graph's results."""

HIDDEN = "image_hidden_states"
"""What output classes that have a field for image features call it."""

TOKEN_TYPES, MODALITIES = "token_type_ids", "mm_token_type_ids"

MOST_FEATURES = 64


@dataclass(frozen=True)
class VisionCall(CallingConvention):
    """Calls of the vision graph.

    images: what it takes. results: how many tensors it gives. guards: what the trace assumed of its inputs' sizes.
    """

    kind: ClassVar[str] = "vision"

    images: ImageInputs
    results: int
    guards: SizeGuards = field(default_factory=SizeGuards)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """As `ImageInputs.tensors`, on `kwargs["device"]`; what else the call has is not looked at."""
        tensors = self.images.tensors(kwargs, kwargs["device"])
        if len(tensors[0]):
            self.guards.check(tensors, self.images.names.__getitem__)
        return tensors

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The features as they are."""
        return list(outputs)

    @property
    def arity(self) -> tuple[int, int]:
        """See the class."""
        return len(self.images.names), self.results

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "kind": self.kind,
            "images": self.images.kind,
            "dtype": str(self.images.dtype).removeprefix("torch."),
            "results": self.results,
            "guards": self.guards.to_list(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], config: Any) -> VisionCall:
        """Inverse of `to_dict`, for a model of this configuration.

        Raises:
            KeyError, TypeError, ValueError: something that no traced model has.
        """
        if values["images"] not in KINDS or values["dtype"] not in CACHE_DTYPES:
            raise ValueError(f"images are {values['images']!r} of {values['dtype']!r}")
        results, guards = values["results"], SizeGuards.from_list(values["guards"])
        if type(results) is not int or not 0 < results < MOST_FEATURES:
            raise ValueError(f"the vision graph has {results!r} results")
        images = KINDS[values["images"]](config, getattr(torch, values["dtype"]))
        guards.validate(images.ranks)
        return cls(images, results, guards)


@dataclass(frozen=True)
class ImagesCall(CausalLMCall):
    """Calls of the language model's graph with images. Its first inputs are the vision graph's results.

    vision: how that graph is called.
    token_type: what the graph takes for token_type_ids that a call leaves out; None where it cannot.
    """

    kind: ClassVar[str] = IMAGES

    vision: VisionCall = field(kw_only=True)
    token_type: int | None = None

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.vision.images.config

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """See the base class; token types and features are served, and what brought those is not looked at."""
        own = {FEATURES, MODALITIES, *self.vision.images.arguments}
        if TOKEN_TYPES in self.inputs:
            own.add(TOKEN_TYPES)
        kept = {name: value for name, value in kwargs.items() if name in own}
        call = call_arguments(args, {name: value for name, value in kwargs.items() if name not in own})
        return call | kept

    def output(self, logits: Tensor, cache: Any, call: Mapping[str, Any]) -> Any:
        """As the base class; where the float model returns its image features too, with them."""
        result, features = super().output(logits, cache, call), call.get(FEATURES)
        if HIDDEN not in self.output_class.__dataclass_fields__ or not features or not len(features[0]):
            return result
        if isinstance(result, tuple):
            return (*result, features[0])
        return self.output_class(**result, **{HIDDEN: features[0]})

    def _more_inputs(self, call: Mapping[str, Any], mask: Tensor) -> dict[str, Tensor]:
        given = call.get(FEATURES)
        names = [name for name in self.inputs if name.startswith(FEATURES)]
        values = dict(zip(names, given, strict=True)) if given is not None else {}
        if given is not None:
            self.check_count(call["input_ids"], given[0])
        if TOKEN_TYPES in self.inputs:
            values[TOKEN_TYPES] = self._token_types(call.get(TOKEN_TYPES), mask)
        return values

    def check_count(self, ids: Tensor, features: Tensor) -> None:
        """That there is an image token for each feature."""
        count = features.shape[:-1].numel()
        fits = (ids == self.config.image_token_id).sum() == count
        message = (
            f"the images give another number of features than input_ids has image tokens (id"
            f" {self.config.image_token_id}): pass both as the processor made them"
        )
        if torch.compiler.is_compiling():
            torch._assert_async(fits, message)
        elif not fits:
            raise CallError(f"{message}; there are {count} features")

    def _token_types(self, given: Any, mask: Tensor) -> Tensor:
        if given is None:
            if self.token_type is None:
                raise CallError(f"{TOKEN_TYPES} is missing: pass what the processor returns")
            return torch.full_like(mask, self.token_type)
        if not isinstance(given, Tensor) or given.shape != mask.shape:
            raise CallError(f"{TOKEN_TYPES} is {described(given)}: pass {list(mask.shape)}, cached tokens included")
        return given.to(mask.dtype)

    def _positions(self, given: Tensor | None, mask: Tensor, batch: int, query: int) -> Tensor:
        """[B, T], or [3, B, T] for models that count time, height and width."""
        if self.position_rows == 1:
            return super()._positions(given, mask, batch, query)
        if given is None or given.dim() == 2:
            given = super()._positions(given, mask, batch, query)[None]
        return rows_of_positions(given).expand(self.position_rows, batch, query)

    @property
    def position_rows(self) -> int:
        """How many positions a token has."""
        return 3 if self.vision.images.kind == "patches" else 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; the rest is that of the graph for text."""
        return {
            "kind": self.kind,
            "inputs": list(self.inputs),
            "token_type": self.token_type,
            "guards": self.guards.to_list(),
        }

    @classmethod
    def of(cls, causal: CausalLMCall, vision: VisionCall, **own: Any) -> ImagesCall:
        """Beside the graph for text, of which it has all but what is given: inputs, guards, token_type."""
        settings = {one.name: getattr(causal, one.name) for one in fields(CausalLMCall) if one.init}
        return cls(**settings | own, vision=vision)

    @classmethod
    def beside(cls, values: Mapping[str, Any], causal: CausalLMCall, vision: VisionCall) -> ImagesCall:
        """Inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: something that no traced model has.
        """
        inputs = tuple(values["inputs"])
        known = (*feature_names(vision.results), *causal.inputs)
        if inputs not in (known, (*known, TOKEN_TYPES)) or values["token_type"] not in (None, 0, 1):
            raise ValueError(f"inputs are {inputs}, token_type {values['token_type']!r}")
        found = cls.of(causal, vision, inputs=inputs, token_type=values["token_type"])
        guards = SizeGuards.from_list(values["guards"])
        ranks = {"logits_to_keep": 1, "position_ids": 2 + (found.position_rows > 1)}
        guards.validate([*(ranks.get(name, 2) for name in inputs), 4])
        return cls.of(causal, vision, inputs=inputs, token_type=values["token_type"], guards=guards)


@dataclass(frozen=True)
class WholeCall(CallingConvention):
    """Calls of the whole graph, which is traced, planned and calibrated, and then taken apart."""

    kind: ClassVar[str] = "vision_language"

    vision: VisionCall
    images: ImagesCall
    guards: SizeGuards = field(default_factory=SizeGuards)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The inputs of the vision graph; then those of the other but the features."""
        call = self._call(args, kwargs)
        ids = input_ids_of(call)
        pixels = self.vision.flatten((), {**call, "device": ids.device})
        cache = call.get("past_key_values")
        past = self.images._past(cache, ids)
        return [*pixels, *self._language.inputs_of(call, ids, past[0], tokens_in(cache)), *past]

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As that of the images' graph."""
        return self.images.unflatten(outputs[: len(outputs) - self.vision.results], (), self._call(args, kwargs))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        call = self.images.arguments(args, kwargs)
        if call.get("position_ids") is None and call.get(PIXELS) is not None:
            call["position_ids"] = image_positions(self.images.config, call)
        return call

    @property
    def _language(self) -> ImagesCall:
        names = tuple(name for name in self.images.inputs if not name.startswith(FEATURES))
        return ImagesCall.of(
            self.images, self.vision, inputs=names, token_type=self.images.token_type, guards=SizeGuards()
        )

    @property
    def arity(self) -> tuple[int, int]:
        """See the class."""
        (pixels, results), (language, outputs) = self.vision.arity, self.images.arity
        return pixels + language - results, outputs + results

    def to_dict(self) -> dict[str, Any]:
        """What kind it is; it is taken apart before it is saved."""
        return {"kind": self.kind}


def feature_names(results: int) -> tuple[str, ...]:
    """Names of the inputs of the images' graph for the vision graph's results."""
    return tuple(FEATURES if n == 0 else f"{FEATURES}_{n}" for n in range(results))
