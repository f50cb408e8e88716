"""What an encoder-decoder's decoder reads for labels."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED_LABEL = -100

SHIFTS = ("start", "wrap")
"""What a label's decoder input begins with: the start token, or the label's own last token, as mBART has it."""


def shifted(labels: Tensor, rule: str, pad: int, start: int | None) -> Tensor:
    """Labels [B, T] moved one to the right, by one of `SHIFTS`; what is ignored in them becomes padding."""
    tokens = labels.masked_fill(labels == IGNORED_LABEL, pad)
    if rule == "wrap":
        first = tokens.gather(1, (tokens.ne(pad).sum(1, keepdim=True) - 1).clamp(min=0))
    else:
        assert start is not None
        first = torch.full((len(labels), 1), start, dtype=tokens.dtype, device=tokens.device)
    return torch.cat((first, tokens[:, :-1]), dim=1)
