"""What a report is about, gathered from a quantized model in memory or from its folder, without loading weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from lobcq_fx.calibration.codebook_sets import MODULE
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CheckpointError
from lobcq_fx.inventory import Inventory
from lobcq_fx.model import QuantizedModel
from lobcq_fx.storage.checkpoint import is_checkpoint
from lobcq_fx.storage.stored_tensors import entry_of, open_weights

CODEBOOKS = f"{MODULE}.codebooks"


@dataclass(frozen=True)
class ReportContent:
    """name: of the float model. architecture: its class. codebooks: int8 [N_c, 16] by stored name.

    scores: what `lobcq eval -o FILE` wrote of the model, or None.
    """

    name: str
    architecture: str
    inventory: Inventory
    config: LobcqConfig
    codebooks: Mapping[str, Tensor]
    scores: Mapping[str, Any] | None = None

    @classmethod
    def of_model(cls, model: QuantizedModel) -> ReportContent:
        """From a model that `quantize` or `load` returned."""
        state = model.state_dict()
        config = model.config.to_dict() if model.config is not None else {}
        codebooks = {key: state[key].cpu() for key in sorted(state) if key.startswith(CODEBOOKS)}
        return cls(_name(config), _architecture(config), model.inventory, model.lobcq_config, codebooks)

    @classmethod
    def of_folder(cls, folder: Path) -> ReportContent:
        """From a folder that `save_pretrained` wrote.

        Raises:
            CheckpointError: it is not such a folder, or is damaged.
        """
        if not is_checkpoint(folder):
            raise CheckpointError(f"{folder} is not a quantized model: write one with `lobcq quantize ... -o {folder}`")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            settings = LobcqConfig.from_dict(config["quantization_config"]["lobcq_config"])
            inventory = Inventory.from_dict(json.loads((folder / "inventory.json").read_text(encoding="utf-8")))
            with open_weights(folder, entry_of(folder, config["quantization_config"])) as weights:
                names = sorted(name for name in weights.names if name.startswith(CODEBOOKS))
                codebooks = {name: weights.get_tensor(name) for name in names}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} is damaged: {type(error).__name__}: {error}") from None
        return cls(_name(config), _architecture(config), inventory, settings, codebooks)


def _name(config: Mapping[str, Any]) -> str:
    """What the float model was called, by the last of its path; its class where it was no folder."""
    return Path(str(config.get("_name_or_path") or "")).name or _architecture(config)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type") or "model"]
    return str(names[0])
