"""Values in a file of `torch.save`, which says of a disk that fails no more than that something went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_values(path: Path, values: Any) -> None:
    """Write tensors and numbers, for `torch.load`.

    Raises:
        OSError: the disk is full, or fails; names the file.
    """
    try:
        with path.open("wb") as file:
            torch.save(values, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
