"""load(): a saved folder in, the quantized model out; the float weights are not needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lobcq_fx.errors import CheckpointError, ConfigError, LobcqError
from lobcq_fx.frontends import front_end_for
from lobcq_fx.model import QuantizedModel
from lobcq_fx.storage.atomic_folder import leftovers
from lobcq_fx.storage.checkpoint import load_checkpoint

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device] | None


def load(directory: str | Path, *, verify: bool = True, device_map: DeviceMap = None) -> QuantizedModel:
    """Open a folder written by `QuantizedModel.save_pretrained`. Nothing is unpickled.

    Args:
        directory: the folder.
        verify: compare every tensor with the digest that was saved with it.
        device_map: where the model is to be, as transformers takes it: a device, `"auto"` for a GPU if there is one, or
            `{"": device}`; None means the CPU. A graph is on one device, which a map of several is refused for.

    Returns:
        The model, on the CPU with outputs bit-identical to those of the model that was saved.

    Raises:
        ConfigError: a device_map of something else.
        CheckpointError: names the file or tensor and what is wrong with it.
    """
    directory, device = Path(directory), _device_of(device_map)
    if not directory.is_dir():
        left = "".join(f". A save that was killed has left {one}" for one in leftovers(directory))
        raise CheckpointError(f"{directory} is no folder: pass one written by save_pretrained{left}")
    try:
        saved = load_checkpoint(directory, verify=verify)
        front_end = front_end_for(saved)
        return front_end.build(front_end.read(saved, directory)).to(device)
    except (LobcqError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # of a configuration that transformers stumbles over, or of source that is none
        raise CheckpointError(f"{directory} is damaged: {type(error).__name__}: {error}") from error


def _device_of(device_map: DeviceMap) -> torch.device:
    """The one device of a map."""
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    devices = (
        set(device_map.values()) if isinstance(device_map, Mapping) else {"cpu" if device_map is None else device_map}
    )
    try:
        (device,) = (torch.device(one) for one in devices)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"device_map={device_map!r}: a graph is on one device, such as 'cpu', 'cuda:0', 'auto' or {{'': 'cuda:0'}}."
            " Remedy: one of these, or AutoModel.from_pretrained(folder, device_map=...), of modules on several"
        ) from error
    return device
