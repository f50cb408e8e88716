"""A quantized causal language model with Hugging Face's `generate()`."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from lobcq_fx.cache_format import CacheFormat
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CallError, ConfigError
from lobcq_fx.format import FormatSpec
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.generation_overrides import PREPARE, delegated
from lobcq_fx.frontends.lobcq_cache import LobcqCache
from lobcq_fx.frontends.lobcq_static_cache import LobcqStaticCache
from lobcq_fx.frontends.output_types import CACHE_NAME, CACHE_PARAMS
from lobcq_fx.frontends.plain_outputs import without_extra_outputs
from lobcq_fx.frontends.quantized_cache_call import QuantizedCacheCall, QuantizedStaticCacheCall
from lobcq_fx.frontends.recurrent_call import NO_STATIC_CACHE, RecurrentCall
from lobcq_fx.frontends.recurrent_states import holds_tokens
from lobcq_fx.frontends.reserving_cache import ReservingCache, appends_in_place
from lobcq_fx.frontends.reserving_cache_call import ReservingCacheCall
from lobcq_fx.frontends.static_cache_call import (
    STATIC_CACHE,
    StaticCacheCall,
    cache_mask,
    initialize,
    is_static,
    static_cache,
)
from lobcq_fx.frontends.vision_language_call import IMAGES
from lobcq_fx.frontends.whole_batches import WholeBatches
from lobcq_fx.graph.graph_module import copied, ensure_code
from lobcq_fx.graph.shared_tensors import SharingGraphModule
from lobcq_fx.model import ModelGraph, ModelParts, QuantizedModel, Reader
from lobcq_fx.passes.order import quantizing_cache
from lobcq_fx.passes.quantize_cache import QuantizeCache
from lobcq_fx.tracing.calling import CallingConvention
from lobcq_fx.tracing.trace import MAIN

logger = logging.getLogger(__name__)

NO_QUANTIZED_CACHE = (
    "the model keeps states of a fixed size beside or instead of keys and values, of which quantized caches are not"
    " served. Remedy: leave it out, and pass a DynamicCache"
)


def cache_refusal(config: LobcqConfig) -> str | None:
    """Why a model with such states takes no settings with a quantized cache; None where they have none."""
    return None if config.kv_cache is None else f"kv_cache is {config.kv_cache.name!r}, but {NO_QUANTIZED_CACHE}"


DEQUANTIZE = torch.ops.lobcq.dequantize_states.default


class CausalLMForward(WholeBatches):
    """The `forward` that Hugging Face's `generate()` reads and calls; the next class has one that takes keywords.

    config: the model's Hugging Face configuration.
    """

    config: Any

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
        **kwargs: Any,
    ) -> Any:
        """The next-token logits of a causal language model, and its cache.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, P + T], 0 at padding, with P cached tokens; None means no padding.
            position_ids: [B, T]; None counts as the float model does.
            past_key_values: a DynamicCache or a LobcqCache, which grow in place; None starts a new one, whose layers
                that slide a window keep what it can still see, as those of DynamicCache(config=config) do. Or a static
                cache, which has a fixed length C: see `QuantizedCausalLM.static_cache`; the mask may then be [B, C], 0
                or 1 past P + T.
            labels: [B, T]; adds the shifted cross-entropy as `loss`.
            use_cache: False leaves the cache out of the output; None does what the configuration says.
            logits_to_keep: how many last positions get logits, 0 for all; or an index tensor.
            return_dict: False returns a tuple; None does what the configuration says.
            cache: what transformers calls past_key_values from 5.24 on.
            cache_params: what models without attention call it.
            **kwargs: settings of the loss, such as num_items_in_batch; what would change the result is refused.

        Returns:
            The output class of the float model, for example CausalLMOutputWithPast.

        Raises:
            CallError: the traced graph cannot serve the call.
        """
        caches = {"past_key_values": past_key_values, "cache": cache, "cache_params": cache_params}
        given = [name for name, one in caches.items() if one is not None]
        if len(given) > 1:
            raise CallError(f"{' and '.join(given)} are two names of the same argument: pass one of them")
        if use_cache is None:
            use_cache = getattr(self.config.get_text_config(), "use_cache", None)
        cache = caches[given[0]] if given else None
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": self._new_cache() if cache is None and use_cache is not False else cache,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "return_dict": self.config.return_dict if return_dict is None else return_dict,
            **kwargs,
        }
        return super().forward(**call)  # type: ignore[misc]

    def _new_cache(self) -> Any:
        """The cache of a call that brings none; None is one that grows, of floats."""
        return None

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """What `generate()` calls `forward` with; where the original class has a way of its own, this is it."""
        prepare = delegated(self.config.model_type, PREPARE, CausalLMForward)
        inputs: dict[str, Any]
        if prepare is None:
            inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        else:
            inputs = prepare(self, input_ids, **kwargs)
        return inputs


def graph_config(config: Any) -> Any:
    """A copy for a model that is one graph: nothing for transformers to dispatch, no outputs but logits and cache."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    without_extra_outputs(config)
    return config


class QuantizedCausalLM(CausalLMForward, QuantizedModel, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A `QuantizedModel` that generates: greedy, sampling, beams, batches padded on the left, any prompt length.

    It is a `PreTrainedModel` for whatever asks one for its configuration, device or cache (pipelines, generation);
    parameters, `forward`, casts and saving are `QuantizedModel`'s.
    """

    def __init__(self, front_end: Reader, parts: ModelParts) -> None:
        super().__init__(front_end, parts)
        if parts.generation_config is not None:
            self.generation_config = parts.generation_config
        self.loss_type = (
            "ForCausalLM"  # which transformers guesses from a class's name: its Trainer counts tokens by it
        )
        # What generation asks before it takes tokens back (assisted decoding), which states do not allow.
        self._is_stateful = isinstance(self.calling, RecurrentCall)
        refusal = cache_refusal(parts.lobcq_config) if self._is_stateful else None
        if refusal is not None:
            raise ConfigError(refusal)

    def _base_arguments(self, parts: ModelParts) -> tuple[Any, ...]:
        return (parts.config,)

    def _new_cache(self) -> LobcqCache | ReservingCache | None:
        config = self.lobcq_config
        if config.kv_cache is not None:
            return LobcqCache(config.kv_cache, attention=config.attention, config=self.config)
        eager_cpu = self.device.type == "cpu" and not torch.compiler.is_compiling()
        return ReservingCache() if eager_cpu and self._for_appending is not None else None

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Where nobody asks for another cache, the model's own."""
        implementation = generation_config.cache_implementation
        if isinstance(self.calling, RecurrentCall) and implementation not in (None, "dynamic"):
            raise CallError(
                f"cache_implementation is {implementation!r}, but the model keeps states of a fixed size beside or"
                " instead of keys and values, for which a DynamicCache alone is served. Remedy: leave it out"
            )
        if isinstance(self.calling, RecurrentCall) and not self.calling.attends:
            # Of what it knows as past_key_values, `generate()` asks how many tokens it holds, which states do not know.
            cache = model_kwargs.pop(CACHE_NAME, None)
            if cache is not None and any(holds_tokens(layer) for layer in cache.layers):
                raise CallError(
                    f"{CACHE_NAME} holds tokens, and a model without attention does not know how many of input_ids they"
                    f" are: pass it as {CACHE_PARAMS}, and the new tokens alone as input_ids"
                )
            if generation_config.use_cache is not False and model_kwargs.get(CACHE_PARAMS) is None:
                model_kwargs[CACHE_PARAMS] = DynamicCache(config=self.config) if cache is None else cache
            return
        asked = implementation is not None or model_kwargs.get(CACHE_NAME) is not None
        cache = None if asked or generation_config.use_cache is False else self._new_cache()
        if cache is None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        else:
            model_kwargs[CACHE_NAME] = cache

    def static_cache(
        self,
        max_cache_len: int,
        batch_size: int | None = None,
        *,
        kv_cache: FormatSpec | str | None = None,
        attention: str | None = None,
    ) -> StaticCache | LobcqStaticCache:
        """A cache of a fixed length, for `past_key_values`; the calls write their keys and values into it.

        Its tensors stay where they are, so that a compiled step can be one CUDA graph. It is whole in every layer, also
        where the model slides a window, which the mask applies.

        Args:
            max_cache_len: how many tokens it has room for.
            batch_size: of the calls; None leaves the memory to the first call, which should then not be compiled.
            kv_cache, attention: as in `LobcqConfig`, for keys and values in LO-BCQ; None is what the model was
                quantized for.

        Raises:
            ConfigError: no such format or attention, or attention in integers over floats.
            CallError: the model keeps states of a fixed size.
        """
        calling = self.calling
        if isinstance(calling, RecurrentCall):
            raise CallError(f"{NO_STATIC_CACHE}. Remedy: pass a DynamicCache")
        assert isinstance(calling, CausalLMCall)
        spec = self.lobcq_config.kv_cache if kv_cache is None else kv_cache
        if spec is None and attention not in (None, "w4a16"):
            raise ConfigError(f"attention={attention!r} multiplies keys and values in LO-BCQ: pass kv_cache='8x64' too")
        cache: StaticCache | LobcqStaticCache
        if spec is None:
            cache = static_cache(self.config, calling, max_cache_len)
        else:
            products = self.lobcq_config.attention if attention is None else attention
            cache = LobcqStaticCache(len(calling.cache_heads), max_cache_len, spec, attention=products)
        if batch_size is not None:
            initialize(cache, calling, batch_size, self.device)
        return cache

    def create_masks_for_generate(self, attention_mask: Tensor | None, **call: Any) -> Tensor | None:
        """What `generate()` passes on with a static cache: the 2-D mask over all of it; the graph makes 4-D ones."""
        layer = call[CACHE_NAME].layers[0]
        if attention_mask is None or attention_mask.shape[1] > layer.max_cache_len:
            return attention_mask  # `forward` refuses the latter
        return cache_mask(attention_mask, attention_mask.shape[0], layer.max_cache_len, attention_mask.device)

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, prefill_chunk_size: Any, model_kwargs: Any
    ) -> Cache:
        """As `generate()` makes it, but whole in every layer. A compiled prefill needs its memory beforehand."""
        if "offloaded" in cache_implementation:
            raise CallError(
                f"cache_implementation is {cache_implementation!r}; of the static ones only 'static' is served"
            )
        # As transformers does: a shorter call takes the length of the longest so far, for which a step is compiled.
        length = max(max_cache_len, getattr(self, "_previous_max_cache_length", 0))
        self._previous_max_cache_length = length
        return self.static_cache(length, None if prefill_chunk_size is None else batch_size)

    def _prepack(self) -> None:
        super()._prepack()
        self._quantized_caches: dict[tuple[str, CacheFormat], ModelGraph] = {}  # made of what was lowered just now
        self._for_appending = self._appending_graph()

    def _appending_graph(self) -> ModelGraph | None:
        """The graph for static caches as it serves caches that append in place; None where layers slide a window."""
        graph, calling = self.graphs.get(STATIC_CACHE), self.calling
        if graph is None or type(calling) is not CausalLMCall or calling.windows:
            return None
        assert isinstance(graph.calling, StaticCacheCall)
        return ModelGraph(graph.graph_module, graph.stored, ReservingCacheCall(graph.calling))

    def _for_quantized_cache(self, cache_format: CacheFormat, graph: ModelGraph | None = None) -> ModelGraph:
        """A graph, the main one or that for static caches, as it serves quantized caches; made at the first call.

        Raises:
            CallError: it keeps something else than keys and values.
        """
        graph = self.graphs[MAIN] if graph is None else graph
        key = (graph.calling.kind, cache_format)
        if key not in self._quantized_caches:
            static = isinstance(graph.calling, StaticCacheCall)
            calling = self.calling if static else graph.calling
            assert isinstance(calling, CausalLMCall)
            if isinstance(calling, RecurrentCall):
                raise CallError(f"past_key_values is a LobcqCache, but {NO_QUANTIZED_CACHE}")
            graph_module = SharingGraphModule(self.graph_module, copied(graph.graph_module.graph))
            dtype = getattr(torch, calling.cache_dtype)
            quantize_cache = QuantizeCache(cache_format, calling.cache_heads, dtype, static)
            first, *others = (one(graph_module) for one in quantizing_cache(quantize_cache, self.device))
            if first.refusals:
                reasons = "; ".join(map(str, first.refusals))
                raise CallError(f"the model's graph cannot keep a quantized cache: {reasons}. Pass a DynamicCache")
            left = [refusal for one in others for refusal in one.refusals]
            for refusal in left:
                logger.info("%s", refusal)
            decoded = graph_module.graph.find_nodes(op="call_function", target=DEQUANTIZE)
            if decoded and cache_format.attention != "w4a16":
                reasons = "; ".join(map(str, left)) or "its attention is written out"
                raise CallError(
                    f"past_key_values is LobcqCache(attention={cache_format.attention!r}): not only"
                    f" scaled_dot_product_attention reads this model's cache: {reasons}. Remedy: attention='w4a16'"
                )
            constants = tuple(one.to(self.device) for one in quantize_cache.constants.values())
            row_bytes = tuple(
                cache_format.rows(heads, width).row_bytes for heads, *widths in calling.cache_heads for width in widths
            )
            call: CallingConvention = QuantizedCacheCall(calling, row_bytes, constants)
            if isinstance(graph.calling, StaticCacheCall):
                call = QuantizedStaticCacheCall(calling, graph.calling.guards, row_bytes, constants)
            ensure_code(graph_module)
            self._quantized_caches[key] = ModelGraph(graph_module, graph.stored, call)
        return self._quantized_caches[key]

    def _serving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelGraph:
        reason = self.refused_graphs.get(IMAGES)
        if reason is not None and kwargs.get("pixel_values") is not None:
            raise CallError(f"argument 'pixel_values' is not supported: the model serves text alone: {reason}")
        if isinstance(kwargs.get("past_key_values"), LobcqCache):
            return self._for_quantized_cache(kwargs["past_key_values"].format)
        if isinstance(kwargs.get("past_key_values"), LobcqStaticCache):
            return self._for_quantized_cache(kwargs["past_key_values"].format, self._static_graph())
        if self._for_appending is not None and appends_in_place(kwargs.get("past_key_values")):
            return self._for_appending
        if not is_static(kwargs.get("past_key_values")):
            return super()._serving(args, kwargs)
        return self._static_graph()

    def _static_graph(self) -> ModelGraph:
        """The graph for static caches.

        Raises:
            CallError: there is none.
        """
        graph = self.graphs.get(STATIC_CACHE)
        if graph is None:
            reason = self.refused_graphs.get(STATIC_CACHE, "it was saved by a release that knew none")
            raise CallError(
                f"the model has no graph for static caches: {reason}. Remedy: pass a DynamicCache, or quantize the"
                " float model again"
            )
        return graph
