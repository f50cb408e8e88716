"""How close a quantized encoder's sentence embeddings stay to the float model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobcq_fx.evaluation.predictions import Progress
from lobcq_fx.graph.attributes import device_of


@dataclass(frozen=True)
class SimilarityResult:
    """Cosines between two models' embeddings of the same sentences: their mean, their least value, how many."""

    mean_cosine: float
    min_cosine: float
    sentences: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def mean_pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the real tokens: hidden [B, T, D], attention_mask [B, T] of 0 and 1 -> [B, D].

    Source: mean pooling of sentence-transformers, https://www.sbert.net (1_Pooling, pooling_mode_mean_tokens).
    """
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


@torch.no_grad()
def sentence_embeddings(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    sentences: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """Mean-pooled embeddings of length 1.

    Args:
        model: an encoder, float or quantized: called with what the tokenizer returns, gives `last_hidden_state`.
        tokenizer: a Hugging Face tokenizer with a padding token.
        sentences: one text an embedding.
        batch_size: sentences in one call, padded to the longest of them.
        max_length: tokens of a sentence that are used.
        progress: called as ("embed", sentences done, sentences in all).

    Returns:
        fp32 [N, D] on the CPU.

    Raises:
        ValueError: no sentences.
    """
    if not sentences:
        raise ValueError("no sentences to embed")
    device = device_of(model)
    rows = []
    for first in range(0, len(sentences), batch_size):
        chunk = list(sentences[first : first + batch_size])
        inputs = tokenizer(chunk, padding=True, truncation=True, max_length=max_length, return_tensors="pt").to(device)
        hidden = model(**inputs).last_hidden_state
        rows.append(F.normalize(mean_pooled(hidden.float(), inputs["attention_mask"]), dim=-1).cpu())
        if progress is not None:
            progress("embed", first + len(chunk), len(sentences))
    return torch.cat(rows)


def cosine_similarity(one: Tensor, other: Tensor) -> SimilarityResult:
    """Row by row: [N, D] and [N, D].

    Raises:
        ValueError: the shapes differ or there are no rows.
    """
    if one.shape != other.shape or one.dim() != 2 or not len(one):
        raise ValueError(f"cannot compare embeddings of shapes {tuple(one.shape)} and {tuple(other.shape)}")
    cosines = F.cosine_similarity(one.double(), other.double(), dim=-1)
    return SimilarityResult(cosines.mean().item(), cosines.min().item(), len(cosines))
