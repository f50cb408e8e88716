"""Semantic textual similarity: do an encoder's cosines rank pairs of sentences as people do?

Source: Cer et al., SemEval-2017 Task 1, whose STS Benchmark is scored so; Spearman's rank correlation, 1904.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SentencePair:
    """Two sentences, and how alike people found them: more is more alike, on any scale."""

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class StsResult:
    """spearman: rank correlation of the cosines with people's scores, from -1 to 1."""

    spearman: float
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def sentences_of(pairs: Sequence[SentencePair]) -> list[str]:
    """What to embed: each pair's first sentence, then each one's second."""
    return [one.first for one in pairs] + [one.second for one in pairs]


def sts(embeddings: Tensor, pairs: Sequence[SentencePair]) -> StsResult:
    """Score embeddings [2 N, D] of `sentences_of(pairs)`.

    Raises:
        ValueError: another number of embeddings, or all cosines or all scores the same, so that nothing is ranked.
    """
    if len(embeddings) != 2 * len(pairs):
        raise ValueError(f"{len(embeddings)} embeddings for {len(pairs)} pairs: pass those of sentences_of(pairs)")
    first, second = embeddings.double().chunk(2)
    scores = torch.tensor([one.score for one in pairs], dtype=torch.float64, device=embeddings.device)
    return StsResult(spearman(F.cosine_similarity(first, second, dim=-1), scores), len(pairs))


def spearman(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation of the ranks of two vectors [N]; equal values share the mean of their ranks.

    Raises:
        ValueError: all values of one of them are the same.
    """
    ranks = torch.stack([_ranks(one), _ranks(other)])
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    norms = centred.norm(dim=1)
    if not norms.all():
        raise ValueError("all values are the same: nothing to rank")
    return float(centred[0] @ centred[1] / norms.prod())


def _ranks(values: Tensor) -> Tensor:
    """fp64 [N], from 1."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    shared: Tensor = last - (counts - 1) / 2
    return shared[group]
