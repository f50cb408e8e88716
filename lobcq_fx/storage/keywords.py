"""What Hugging Face's `save_pretrained` takes besides a folder: fine where it changes nothing here, else refused."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

import torch

from lobcq_fx.errors import CheckpointError

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "distributed_checkpoint": (False,),
    "is_main_process": (True,),
    "push_to_hub": (False,),
    "safe_serialization": (True,),
    "save_function": (None, torch.save),
    "state_dict": (None,),
    "variant": (None,),
}
"""The values of each keyword that ask for nothing but the folder that is written anyway."""

UNREAD = frozenset({"save_original_format", "save_peft_format", "token"})
"""Keywords that no value gives anything to do: there is no other format, no adapter, and nothing is uploaded."""

SHARDS = "max_shard_size"

REMEDIES = {
    "is_main_process": "call save_pretrained in the main process alone",
    "push_to_hub": "save the folder, then huggingface_hub.upload_folder(...)",
    "safe_serialization": "leave it out: weights are saved as safetensors",
    "state_dict": "load_state_dict(...) first, then save",
    SHARDS: "leave it out: the weights are one file",
}

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def check_keywords(keywords: Mapping[str, Any], size: int) -> None:
    """Refuse what would have to change what is saved.

    Args:
        keywords: as Hugging Face's `save_pretrained` takes them.
        size: bytes of the weights, which a shard has to have room for.

    Raises:
        CheckpointError: names the keyword.
    """
    for name, value in keywords.items():
        if name in UNREAD:
            continue
        changes_nothing = _holds(value, size) if name == SHARDS else _is_one_of(value, WITHOUT_EFFECT.get(name, ()))
        if not changes_nothing:
            remedy = REMEDIES.get(name, "leave it out")
            raise CheckpointError(f"save_pretrained does not support {name}={reprlib.repr(value)}. Remedy: {remedy}")


def _is_one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Whether it is one of these very objects: tensors and arrays do not compare to a truth value."""
    return any(value is one for one in accepted)


def _holds(limit: Any, size: int) -> bool:
    """Whether a limit, in bytes or with a unit ("5GB", "500MiB"), is no smaller than `size`."""
    found = re.fullmatch(r"(\d+) *([KMGT]?)(i?)B?", str(limit), re.IGNORECASE)
    if found is None:
        return limit is None
    number, unit, binary = found.groups()
    scale = UNITS[unit.upper()]
    if binary:
        scale = 1024 ** (len(str(scale)) // 3)
    return int(number) * scale >= size
