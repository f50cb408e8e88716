"""A prompt as a model's arguments: its tokens, and images where the model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.image_utils import load_image
from transformers.utils.import_utils import is_vision_available

from lobcq_fx.cli.conversation import messages_of, templated
from lobcq_fx.cli.failures import InputError
from lobcq_fx.cli.inputs import first_line


def read_image(path: Path) -> Any:
    """An image of Pillow, in RGB, turned as its camera was held.

    Raises:
        InputError: there is no such file, it is no image, or Pillow is missing.
    """
    if not is_vision_available():
        raise InputError("--image: image files are read by Pillow, which is not installed: pip install pillow")
    if not path.is_file():
        raise InputError(f"--image: there is no file {str(path)!r}")
    try:
        return load_image(str(path))
    except MemoryError:
        raise
    except Exception as error:  # each format's reader raises its own
        raise InputError(
            f"--image: cannot read {path}: {first_line(error)}; pass a PNG, a JPEG, or another image that Pillow knows"
        ) from error


def tokenizer_of(reader: Any) -> Any:
    """A processor's tokenizer, or the tokenizer that it is."""
    return reader.tokenizer if isinstance(reader, ProcessorMixin) else reader


def model_inputs(
    reader: Any, prompt: str, images: Sequence[Any], system: str | None, *, chat: bool
) -> Mapping[str, Tensor]:
    """The arguments of `generate()` for a prompt: input_ids int64 [1, T], its mask, and what the model has of images.

    Args:
        reader: a tokenizer, or a processor, which images need.
        prompt: what to continue, or to answer.
        images: of Pillow; in a chat they stand before the prompt, else in the places of its image tokens.
        system: instructions, of a chat.
        chat: put all of it into the chat template.

    Raises:
        InputError: the template or the processor refuses it, for example a prompt without image tokens.
    """
    if isinstance(reader, ProcessorMixin):
        return _processed(reader, prompt, images, system, chat=chat)
    if chat:
        ids = templated(reader, messages_of(prompt, system))["input_ids"]
    else:
        ids = reader(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _processed(
    processor: Any, prompt: str, images: Sequence[Any], system: str | None, *, chat: bool
) -> Mapping[str, Tensor]:
    if chat:
        messages = [
            {"role": one["role"], "content": [{"type": "text", "text": one["content"]}]}
            for one in messages_of(prompt, system)
        ]
        messages[-1]["content"][:0] = [{"type": "image", "image": image} for image in images]
        found = templated(processor, messages)
    else:
        try:
            found = processor(images=list(images) or None, text=prompt, return_tensors="pt")
        except Exception as error:  # whatever the processor's author raises
            refusal = f"the processor refuses this prompt: {first_line(error)}"
            raise InputError(refusal + _remedy(processor, prompt, len(images))) from error
    return {name: value for name, value in found.items() if name != "labels"}  # PaliGemma's, to train on


def _remedy(processor: Any, prompt: str, images: int) -> str:
    token = getattr(processor, "image_token", None)
    if token is None or prompt.count(token) == images:
        return ""
    return f" Remedy: the prompt needs {token} for each --image, in the place of that image"
