"""What Hugging Face's `save_pretrained` takes besides a folder: fine where it changes nothing here, else refused."""

from __future__ import annotations

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

REMEDIES = {
    "is_main_process": "call save_pretrained in the main process alone",
    "push_to_hub": "save the folder, then huggingface_hub.upload_folder(...)",
    "safe_serialization": "leave it out: weights are saved as safetensors",
    "state_dict": "load_state_dict(...) first, then save",
}


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Refuse what would have to change what is saved.

    Args:
        keywords: as Hugging Face's `save_pretrained` takes them.

    Raises:
        CheckpointError: names the keyword.
    """
    for name, value in keywords.items():
        if name not in UNREAD and not _is_one_of(value, WITHOUT_EFFECT.get(name, ())):
            remedy = REMEDIES.get(name, "leave it out")
            raise CheckpointError(f"save_pretrained does not support {name}={reprlib.repr(value)}. Remedy: {remedy}")


def _is_one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Whether it is one of these very objects: tensors and arrays do not compare to a truth value."""
    return any(value is one for one in accepted)
