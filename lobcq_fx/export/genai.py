"""`genai_config.json`: what onnxruntime-genai reads beside the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lobcq_fx.export.metadata import MODEL
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.model import QuantizedModel

GENAI_CONFIG = "genai_config.json"


def write_genai_files(folder: Path, q: QuantizedModel, library: str | None) -> str | None:
    """Write the configuration.

    Args:
        folder: where the model lies.
        q: the exported causal language model.
        library: name of the op library's file in the folder; genai refuses a path that leads out of it.

    Returns:
        None, or why genai cannot serve the model, in which case nothing is written.
    """
    calling = q.calling
    assert isinstance(calling, CausalLMCall)
    heads = set(calling.cache_heads)
    if len(heads) != 1 or any(key != value for _, key, value in heads):
        return "its layers' caches differ in shape"
    if "attention_mask" not in calling.inputs:
        return "it takes no attention_mask"
    generation: Any = q.generation_config
    if generation.eos_token_id is None:
        return "its generation_config has no eos_token_id"
    text = json.dumps(_config(q, calling, generation, library), indent=2)
    (folder / GENAI_CONFIG).write_text(text + "\n", encoding="utf-8")
    return None


def _config(q: QuantizedModel, calling: CausalLMCall, generation: Any, library: str | None) -> dict[str, Any]:
    config = q.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None) or 2048
    (key_value_heads, head_size, _), *_ = calling.cache_heads
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if library is not None:
        session["custom_ops_library"] = library
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if "position_ids" in calling.inputs:
        inputs["position_ids"] = "position_ids"
    inputs["past_key_names"], inputs["past_value_names"] = "past_key_values.%d.key", "past_key_values.%d.value"
    end, padding = generation.eos_token_id, generation.pad_token_id
    return {
        "model": {
            "type": "decoder",
            "vocab_size": calling.vocab_size,
            "context_length": length,
            "bos_token_id": generation.bos_token_id or 0,
            "eos_token_id": end,
            "pad_token_id": (end[0] if isinstance(end, list) else end) if padding is None else padding,
            "decoder": {
                "session_options": session,
                "filename": MODEL,
                "head_size": head_size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": len(calling.cache_heads),
                "num_key_value_heads": key_value_heads,
                "inputs": inputs,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
            "past_present_share_buffer": False,  # the graph returns a new, longer cache
        },
    }
