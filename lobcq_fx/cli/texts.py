"""Text to model inputs: token ids of a whole text, and batches to calibrate on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lobcq_fx.cli.failures import InputError


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """The whole text without special tokens, int64 [N]."""
    # verbose=False: that the text is longer than the model is no mistake here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def leading_bos(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token if the tokenizer puts one before every text, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def sentences(text: str) -> list[str]:
    """The text's lines, without empty ones."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def calibration_batches(
    tokenizer: Any, text: str, *, samples: int, length: int, causal: bool
) -> list[dict[str, Tensor]]:
    """At most `samples` sequences of at most `length` tokens, spread evenly over the text, as model inputs.

    A language model gets stretches of running text, one a batch; an encoder gets lines with its special tokens.

    Raises:
        InputError: the text is shorter than one sequence of 2 tokens.
    """
    if not causal:
        chosen = _evenly(sentences(text), samples)
        inputs = [tokenizer(line, truncation=True, max_length=length, return_tensors="pt") for line in chosen]
        return [dict(one) for one in inputs]
    ids = token_ids(tokenizer, text)
    bos = leading_bos(tokenizer)
    prefix = torch.tensor([] if bos is None else [bos], dtype=torch.long)
    chunks = [torch.cat((prefix, chunk))[None] for chunk in ids.split(length - len(prefix)) if len(chunk) > 1]
    if not chunks:
        raise InputError("the calibration text is too short: give at least a few hundred words")
    return [{"input_ids": chunk, "attention_mask": torch.ones_like(chunk)} for chunk in _evenly(chunks, samples)]


def _evenly(items: list[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]
