"""A quantized causal language model with Hugging Face's `generate()`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from lobcq_fx.config import LobcqConfig
from lobcq_fx.integrations.causal_lm_call import CausalLMCall
from lobcq_fx.model import QuantizedModel
from lobcq_fx.passes.inventory import Inventory


class CausalLMForward:
    """The `forward` that Hugging Face's `generate()` reads and calls; the next class has one that takes keywords."""

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
        **kwargs: Any,
    ) -> Any:
        """The next-token logits of a causal language model, and its cache.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, P + T], 0 at padding, with P cached tokens; None means no padding.
            position_ids: [B, T]; None counts as the float model does.
            past_key_values: a DynamicCache, which grows in place; None starts a new one.
            labels: [B, T]; adds the shifted cross-entropy as `loss`.
            use_cache: False leaves the cache out of the output.
            logits_to_keep: how many last positions get logits, 0 for all; or an index tensor.
            return_dict: False returns a tuple.
            **kwargs: refused unless None or False.

        Returns:
            The output class of the float model, for example CausalLMOutputWithPast.

        Raises:
            CallError: the traced graph cannot serve the call.
        """
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "return_dict": return_dict,
            **kwargs,
        }
        return super().forward(**call)  # type: ignore[misc]


def graph_config(config: Any) -> Any:
    """A copy for a model that is one graph: there is no attention and no expert for transformers to dispatch."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


class QuantizedCausalLM(CausalLMForward, QuantizedModel, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A `QuantizedModel` that generates: greedy, sampling, beams, batches padded on the left, any prompt length.

    It is a `PreTrainedModel` for whatever asks one for its configuration, device or cache (pipelines, generation);
    parameters, `forward`, casts and saving are `QuantizedModel`'s.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        calling: CausalLMCall,
        lobcq_config: LobcqConfig,
        inventory: Inventory,
        config: Any,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        PreTrainedModel.__init__(self, graph_config(config))
        self._assemble(graph_module, calling, lobcq_config, inventory)
        if generation_config is not None:
            self.generation_config = generation_config
