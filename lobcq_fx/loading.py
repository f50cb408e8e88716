"""load(): a saved folder in, the quantized model out; the float weights are not needed."""

from __future__ import annotations

from pathlib import Path

from lobcq_fx.errors import CheckpointError, LobcqError
from lobcq_fx.frontends import front_end_for
from lobcq_fx.model import QuantizedModel
from lobcq_fx.storage.atomic_folder import leftovers
from lobcq_fx.storage.checkpoint import load_checkpoint


def load(directory: str | Path, *, verify: bool = True) -> QuantizedModel:
    """Open a folder written by `QuantizedModel.save_pretrained`. Nothing is unpickled.

    Args:
        directory: the folder.
        verify: compare every tensor with the digest that was saved with it.

    Returns:
        The model on the CPU, with outputs bit-identical to those of the model that was saved.

    Raises:
        CheckpointError: names the file or tensor and what is wrong with it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        left = "".join(f". A save that was killed has left {one}" for one in leftovers(directory))
        raise CheckpointError(f"{directory} is no folder: pass one written by save_pretrained{left}")
    try:
        saved = load_checkpoint(directory, verify=verify)
        front_end = front_end_for(saved)
        return front_end.build(front_end.read(saved, directory))
    except (LobcqError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # of a configuration that transformers stumbles over, or of source that is none
        raise CheckpointError(f"{directory} is damaged: {type(error).__name__}: {error}") from error
