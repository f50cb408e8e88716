"""A quantized vision-language model with Hugging Face's `generate()`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.causal_lm import QuantizedCausalLM
from lobcq_fx.frontends.generation_overrides import POSITIONS, UPDATE, delegated
from lobcq_fx.frontends.growing_cache import is_empty
from lobcq_fx.frontends.image_inputs import GRID, PIXEL_MASK, PIXELS
from lobcq_fx.frontends.lobcq_cache import LobcqCache
from lobcq_fx.frontends.lobcq_static_cache import LobcqStaticCache
from lobcq_fx.frontends.multimodal_positions import positions_by, rows_of_positions, without_weights
from lobcq_fx.frontends.static_cache_call import StaticCacheCall, is_static
from lobcq_fx.frontends.static_images_call import StaticImagesCall
from lobcq_fx.frontends.vision_language_call import FEATURES, MODALITIES, TOKEN_TYPES, ImagesCall, VisionCall
from lobcq_fx.model import ModelGraph, ModelParts, Reader

NO_VIDEO = "videos are not served: pass single frames as images, or call the float model"


class QuantizedVisionLanguageLM(QuantizedCausalLM):
    """A `QuantizedCausalLM` that takes images, as many as a prompt has image tokens for.

    A call with images runs the vision graph, and the language model's graph with its features; all others run the
    graph for text, on whichever cache.
    """

    def __init__(self, front_end: Reader, parts: ModelParts) -> None:
        super().__init__(front_end, parts)
        self.__dict__["_positions"] = without_weights(self.config)  # not by setattr: it is no part of the model

    @property
    def model(self) -> Any:
        """What `generate()` of models with positions in time, height and width asks for them."""
        if self.__dict__["_positions"] is None:
            raise AttributeError(f"a quantized {self.config.model_type} has graphs, and no attribute 'model'")
        return self.__dict__["_positions"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Any = None,
        cache_params: Any = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        image_features: list[Tensor] | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The next-token logits of a prompt, with or without images.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, labels, use_cache, logits_to_keep, return_dict,
                cache, cache_params, **kwargs: as `CausalLMForward.forward`; positions may be [3, B, T] or [4, B, T]
                where the model counts time, height and width.
            pixel_values: images as the model's processor returns them, in the order of their tokens in `input_ids`.
            pixel_attention_mask: of tiles, which of their pixels are real.
            image_grid_thw: of patches, int64 [N, 3], the grid of each image.
            token_type_ids: [B, P + T], where the processor returns them: what attends in both directions.
            mm_token_type_ids: [B, T], where the processor returns them: what is an image, for positions.
            image_features: what `image_features_of` gave, in the place of pixels.
            pixel_values_videos, video_grid_thw: refused.

        Returns:
            The output class of the float model, for example LlavaCausalLMOutputWithPast.

        Raises:
            CallError: the traced graphs cannot serve the call.
        """
        if pixel_values_videos is not None or video_grid_thw is not None:
            raise CallError(f"pixel_values_videos: {NO_VIDEO}")
        given = {PIXELS: pixel_values, PIXEL_MASK: pixel_attention_mask, GRID: image_grid_thw}
        kept = past_key_values if cache is None else cache
        call: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "return_dict": return_dict,
            "cache": cache,
            "cache_params": cache_params,
            **kwargs,
        }
        if position_ids is None and isinstance(input_ids, Tensor) and self.__dict__["_positions"] is not None:
            asked = {**call, **given, "past_key_values": kept, MODALITIES: mm_token_type_ids}
            call["position_ids"] = positions_by(self.model, asked)
        elif mm_token_type_ids is not None and self.__dict__["_positions"] is None:
            raise CallError(f"{MODALITIES} is not supported: the model counts positions without")
        if any(value is not None for value in given.values()):
            if image_features is not None:
                raise CallError(f"{FEATURES} and {PIXELS} are the same images: pass one of them")
            image_features = self.image_features_of(**given)
        if token_type_ids is not None and TOKEN_TYPES not in self._images.inputs:
            raise CallError(f"{TOKEN_TYPES} is not supported: the float model takes none")
        if token_type_ids is not None and image_features is None and is_empty(kept):
            image_features = self.image_features_of()  # text whose tokens may attend in both directions
        if image_features is None:
            call["position_ids"] = _of_text(call["position_ids"])
        else:
            call |= {FEATURES: image_features, TOKEN_TYPES: token_type_ids}
        return super().forward(**call)

    def image_features_of(self, **images: Any) -> list[Tensor]:
        """What the vision graph makes of images, for `image_features`: to ask several prompts about them.

        Args:
            **images: `pixel_values` and what the processor returns with it, as `forward` takes them.

        Returns:
            Features [L, D], or [N, L / N, D] of N images; then those for each of the first layers that gets some.

        Raises:
            CallError: they are of another form than the model takes.
        """
        graph = self.graphs[VisionCall.kind]
        calling = graph.calling
        assert isinstance(calling, VisionCall)
        images = {name: value for name, value in images.items() if value is not None}
        for name in images:
            if name not in calling.images.arguments:
                raise CallError(f"argument {name!r} is not supported: images come as {calling.images.arguments}")
        if images and PIXELS not in images:
            raise CallError(f"{PIXELS} is missing: {', '.join(images)} came without")
        found = [self._call(graph, (), {**one, "device": self.device}) for one in calling.images.apart(images)]
        return found[0] if len(found) == 1 else [torch.cat(one) for one in zip(*found, strict=True)]

    @property
    def _images(self) -> ImagesCall:
        calling = self.graphs[ImagesCall.kind].calling
        assert isinstance(calling, ImagesCall)
        return calling

    def _serving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelGraph:
        if kwargs.get(FEATURES) is None:
            return super()._serving(args, kwargs)
        graph, cache = self.graphs[ImagesCall.kind], kwargs.get("past_key_values")
        if isinstance(cache, LobcqStaticCache):
            raise CallError("a LobcqStaticCache takes no images: pass a LobcqCache, or a static cache of floats")
        if isinstance(cache, LobcqCache):
            return self._for_quantized_cache(cache.format, graph)
        if is_static(cache):
            static = self._static_graph().calling
            assert isinstance(static, StaticCacheCall)
            return ModelGraph(graph.graph_module, graph.stored, StaticImagesCall(self._images, static))
        return graph

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Images are encoded here, once for all beams."""
        arguments = self._images.vision.images.arguments
        images = {name: model_kwargs.pop(name) for name in arguments if model_kwargs.get(name) is not None}
        features = model_kwargs.pop(FEATURES, None)
        if images:
            features = self.image_features_of(**images)
        if features is not None and expand_size > 1:
            assert input_ids is not None
            self._images.check_count(input_ids, features[0])
            counts = (input_ids == self.config.image_token_id).sum(1).tolist()
            features = [_repeated(one, counts, expand_size) for one in features]
        ids, expanded = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return ids, expanded if features is None else {**expanded, FEATURES: features}

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """See the base class; what is in the cache already is not brought again."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache") is not False:
            for name in (FEATURES, TOKEN_TYPES, MODALITIES):
                inputs.pop(name, None)
        return inputs

    def _prepare_position_ids_for_generation(self, *args: Any) -> Any:
        prepare = delegated(self.config.model_type, POSITIONS, QuantizedVisionLanguageLM)
        return super()._prepare_position_ids_for_generation(*args) if prepare is None else prepare(self, *args)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        update = delegated(self.config.model_type, UPDATE, QuantizedVisionLanguageLM)
        if update is None:
            return super()._update_model_kwargs_for_generation(*args, **kwargs)
        return update(self, *args, **kwargs)


def _of_text(positions: Tensor | None) -> Tensor | None:
    """Positions [B, T] of text, of which time, height and width are the same.

    Raises:
        CallError: they are not.
    """
    if positions is None or positions.dim() < 3:
        return positions
    rows = rows_of_positions(positions)
    same, message = (rows == rows[:1]).all(), "position_ids are those of images, which the call does not bring"
    if torch.compiler.is_compiling():
        torch._assert_async(same, message)
    elif not same:
        raise CallError(message)
    return rows[0]


def _repeated(features: Tensor, counts: list[int], times: int) -> Tensor:
    """Features of the sequences of a batch, `counts` of each, with those of every sequence repeated."""
    flat = features.flatten(0, -2)
    return torch.cat([one.repeat(times, 1) for one in flat.split(counts)]).view(-1, *features.shape[1:])
