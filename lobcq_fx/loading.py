"""load(): a saved folder in, the quantized model out; the float weights are not needed."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from lobcq_fx.errors import CheckpointError
from lobcq_fx.frontends.causal_lm import QuantizedCausalLM
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.output_types import import_output_types
from lobcq_fx.frontends.static_cache_call import StaticCacheCall
from lobcq_fx.model import QuantizedModel
from lobcq_fx.storage.checkpoint import Checkpoint, load_checkpoint
from lobcq_fx.tracing.calling import ModuleCall
from lobcq_fx.tracing.trace import TracedModel


def load(directory: str | Path) -> QuantizedModel:
    """Open a folder written by `QuantizedModel.save_pretrained`. Nothing is unpickled.

    Args:
        directory: the folder.

    Returns:
        The model on the CPU, with outputs bit-identical to those of the model that was saved.

    Raises:
        CheckpointError: names the file or tensor and what is wrong with it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no folder: pass one written by save_pretrained")
    saved = load_checkpoint(directory)
    config = None if saved.config is None else AutoConfig.for_model(**saved.config)
    parts = (saved.lobcq_config, saved.inventory, config)
    try:
        match saved.calling["kind"]:
            case CausalLMCall.kind:
                generation_config = GenerationConfig.from_pretrained(directory)
                calling = CausalLMCall.from_dict(saved.calling)
                return QuantizedCausalLM(
                    saved.graph_module,
                    calling,
                    *parts,
                    generation_config,
                    variants=_variants(saved, calling),
                    refused_variants=saved.refused_variants,
                )
            case ModuleCall.kind:
                import_output_types(str(saved.calling.get("outputs")))
                return QuantizedModel(saved.graph_module, ModuleCall.from_dict(saved.calling), *parts)
            case kind:
                raise CheckpointError(f"{directory}/graph.json has the unknown calling convention {kind!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}/graph.json: the calling convention is damaged: {error}") from None


def _variants(saved: Checkpoint, calling: CausalLMCall) -> dict[str, TracedModel]:
    """The other graphs of a causal language model. One of a kind unknown here is left out."""
    return {
        name: TracedModel(graph_module, StaticCacheCall(calling))
        for name, (graph_module, other) in saved.variants.items()
        if name == other["kind"] == StaticCacheCall.kind
    }
