"""Text to model inputs: token ids of a whole text, and batches to calibrate on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lobcq_fx.cli.failures import InputError
from lobcq_fx.evaluation.continuations import leading_bos

if TYPE_CHECKING:
    from lobcq_fx.cli.inputs import ModelFolder


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """The whole text without special tokens, int64 [N]."""
    # verbose=False: that the text is longer than the model is no mistake here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long, device="cpu")


def sentences(text: str) -> list[str]:
    """The text's lines, without empty ones."""
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class CalibrationText:
    """A text to calibrate on: at most `samples` sequences of at most `length` tokens, spread evenly over it."""

    text: str
    samples: int
    length: int

    def batches(self, tokenizer: Any, *, causal: bool) -> list[dict[str, Tensor]]:
        """Model inputs, one sequence each: running text for a language model, a line for an encoder.

        Raises:
            InputError: the text is shorter than one sequence of 2 tokens.
        """
        if not causal:
            chosen = _evenly(sentences(self.text), self.samples)
            return [dict(tokenizer(s, truncation=True, max_length=self.length, return_tensors="pt")) for s in chosen]
        bos = leading_bos(tokenizer)
        prefix = torch.tensor([] if bos is None else [bos], dtype=torch.long, device="cpu")
        chunks = token_ids(tokenizer, self.text).split(self.length - len(prefix))
        chosen = _evenly([torch.cat((prefix, chunk))[None] for chunk in chunks if len(chunk) > 1], self.samples)
        if not chosen:
            raise InputError("the calibration text is too short: give at least a few hundred words")
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in chosen]


def check_calibration(folder: ModelFolder) -> None:
    """Refuse a text for a model that needs more than texts.

    Raises:
        InputError: names the model.
    """
    if folder.is_encoder_decoder:
        raise InputError(
            f"{folder.architecture} is an encoder-decoder, which is calibrated on inputs with their answers: call"
            ' lobcq_fx.quantize(model, [{"input_ids": ..., "labels": ...}, ...], config) in Python'
        )
    if folder.takes_images:
        raise InputError(
            f"{folder.architecture} is a vision-language model, which is calibrated on prompts with images: call"
            ' lobcq_fx.quantize(model, [processor(images=..., text=..., return_tensors="pt"), ...], config) in Python'
        )


def example_call(tokenizer: Any) -> dict[str, Tensor]:
    """A call to trace an encoder with, so that it takes whatever its tokenizer returns."""
    return dict(tokenizer(["a first example", "a second example, somewhat longer"], padding=True, return_tensors="pt"))


def _evenly(items: list[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]
