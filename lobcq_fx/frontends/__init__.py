"""One front end for each kind of model: how it is traced, called, built and loaded.

A plain module is quantized, and loaded, without importing transformers; diffusers is imported for its own models.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lobcq_fx.errors import CheckpointError
from lobcq_fx.frontends.base import FrontEnd
from lobcq_fx.frontends.plain import PlainFrontEnd
from lobcq_fx.storage.checkpoint import Checkpoint
from lobcq_fx.tracing.calling import ModuleCall


def front_end_of(model: nn.Module) -> FrontEnd:
    """The front end for a float model."""
    diffusers: Any = sys.modules.get("diffusers.models.modeling_utils")
    if diffusers is not None and isinstance(model, diffusers.ModelMixin):
        from lobcq_fx.frontends.diffusion import DiffusionFrontEnd

        return DiffusionFrontEnd()
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return PlainFrontEnd()
    from lobcq_fx.frontends.causal_lm_front_end import CausalLMFrontEnd
    from lobcq_fx.frontends.encoder import EncoderFrontEnd
    from lobcq_fx.frontends.seq2seq_front_end import Seq2SeqFrontEnd
    from lobcq_fx.frontends.transformers_trace import is_causal_lm, is_seq2seq_lm, reads_images
    from lobcq_fx.frontends.vision_language_front_end import VisionLanguageFrontEnd

    if is_causal_lm(model):
        return VisionLanguageFrontEnd() if reads_images(model) else CausalLMFrontEnd()
    return Seq2SeqFrontEnd() if is_seq2seq_lm(model) else EncoderFrontEnd()


def front_end_for(saved: Checkpoint) -> FrontEnd:
    """The front end for what a folder holds.

    Raises:
        CheckpointError: a kind of model that is unknown here.
    """
    kind = saved.calling.get("kind")
    if kind == ModuleCall.kind and saved.config is None:
        return PlainFrontEnd()
    if kind == ModuleCall.kind:
        from lobcq_fx.frontends.encoder import EncoderFrontEnd

        return EncoderFrontEnd()
    if kind == "diffusion":
        try:
            from lobcq_fx.frontends.diffusion import DiffusionFrontEnd
        except ImportError as error:
            raise CheckpointError(f"a model of diffusers needs that package: {error}. Remedy: install it") from None

        return DiffusionFrontEnd()
    if kind == "causal_lm" and "vision" in saved.graphs:
        from lobcq_fx.frontends.vision_language_front_end import VisionLanguageFrontEnd

        return VisionLanguageFrontEnd()
    if kind in ("causal_lm", "recurrent_causal_lm"):
        from lobcq_fx.frontends.causal_lm_front_end import CausalLMFrontEnd

        return CausalLMFrontEnd()
    if kind == "seq2seq":
        from lobcq_fx.frontends.seq2seq_front_end import Seq2SeqFrontEnd

        return Seq2SeqFrontEnd()
    raise CheckpointError(f"graph.json has the unknown calling convention {kind!r}: update lobcq-fx")
