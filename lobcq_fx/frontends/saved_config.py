"""The Hugging Face configuration of a saved folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.checkpoint import Checkpoint


def config_of_class(model: Any) -> Any:
    """A copy of a model's configuration that names its class, as `save_pretrained` of transformers sees to.

    Models that were read from another format's file (GGUF) have its settings there, which hold for that file alone.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def config_of(saved: Checkpoint, directory: Path) -> Any:
    """An object of the model's own configuration class.

    Raises:
        CheckpointError: transformers knows no such model here.
    """
    settings = saved.config or {}
    try:
        return AutoConfig.for_model(**_floats(settings))
    except (KeyError, TypeError, ValueError) as error:
        name = settings.get("model_type")
        raise CheckpointError(
            f"{directory}/config.json names the model type {name!r}, which transformers does not know here: {error}."
            " Remedy: register its configuration class first, AutoConfig.register(...), or quantize a plain module"
        ) from None


def _floats(value: Any) -> Any:
    """Settings with infinity and NaN, for which JSON has no numbers, as transformers writes them put back."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, dict):
        return {name: _floats(one) for name, one in value.items()}
    return [_floats(one) for one in value] if isinstance(value, list) else value
