"""The Hugging Face configuration of a saved folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.checkpoint import Checkpoint


def config_of(saved: Checkpoint, directory: Path) -> Any:
    """An object of the model's own configuration class.

    Raises:
        CheckpointError: transformers knows no such model here.
    """
    settings = saved.config or {}
    try:
        return AutoConfig.for_model(**settings)
    except (KeyError, TypeError, ValueError) as error:
        name = settings.get("model_type")
        raise CheckpointError(
            f"{directory}/config.json names the model type {name!r}, which transformers does not know here: {error}."
            " Remedy: register its configuration class first, AutoConfig.register(...), or quantize a plain module"
        ) from None
