"""Some parameters of a folder's model, as transformers makes them of stored tensors; the others are not read."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lobcq_fx.errors import CheckpointError
from lobcq_fx.streaming.float_folder import FloatFolder
from lobcq_fx.streaming.skeleton import Provenance
from lobcq_fx.streaming.transformers_loading import load_through


def read_parameters(
    folder: FloatFolder, dtype: torch.dtype | str, provenance: Provenance, names: AbstractSet[str]
) -> dict[str, Tensor]:
    """Parameters by the names that `provenance` has them under.

    Raises:
        CheckpointError: the folder cannot be read, or is not what it was.
    """
    found: dict[str, Tensor] = {}

    def read(source: str) -> Tensor:
        return folder.read(source) if provenance.parameters_of(source) & names else folder.without_content(source)

    def take(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for alias, tensor in parameters.items():
            if provenance.aliases[alias] in names:
                found[provenance.aliases[alias]] = tensor
        return {}

    load_through(folder, dtype, read, take)
    missing = sorted(names - found.keys())
    if missing:
        raise CheckpointError(f"{folder.path} gave no {missing[0]}, and {len(missing) - 1} more parameters")
    return found
