"""What language models that generate have in common, with and without an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.nn.functional import kl_div
from transformers import GenerationConfig, PreTrainedModel

from lobcq_fx.frontends.base import FrontEnd
from lobcq_fx.frontends.causal_lm import graph_config
from lobcq_fx.frontends.roles import roles_of
from lobcq_fx.frontends.saved_config import config_of, config_of_class
from lobcq_fx.storage.checkpoint import Checkpoint


class LanguageModelFrontEnd(FrontEnd):
    """A model whose first result is the logits of next tokens, and which generates by them."""

    failing: ClassVar[str] = (
        "change what of its configuration fails on a prompt, or on the next token with the cache that a prompt left; or"
        " wrap it in a torch.nn.Module that calls it with use_cache=False and returns the logits, and quantize that"
        " with example_inputs"
    )

    def distance(self, outputs: Sequence[Any], expected: Sequence[Any]) -> float:
        """The KL divergence of the next token's distribution from the float model's, in nats a token."""
        own, their = (one[0].float().log_softmax(-1) for one in (outputs, expected))
        terms = kl_div(own, their, reduction="none", log_target=True)
        return float(terms.nan_to_num(nan=0.0).sum(-1).mean())  # NaN is where both rule a token out

    def roles(self, model: nn.Module) -> Mapping[str, str]:
        """The language model's head."""
        assert isinstance(model, PreTrainedModel)
        return roles_of(model)

    def configs(self, model: nn.Module) -> dict[str, Any]:
        """The model's configuration, and how it generates."""
        return {"config": graph_config(config_of_class(model)), "generation_config": model.generation_config}

    def saved_configs(self, saved: Checkpoint, directory: Path) -> dict[str, Any]:
        """The same."""
        config, generation_config = config_of(saved, directory), GenerationConfig.from_pretrained(directory)
        return {"config": graph_config(config), "generation_config": generation_config}
