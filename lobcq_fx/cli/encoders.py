"""What `lobcq eval` measures of encoders, one or two of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lobcq_fx.cli.console import ProgressBars
from lobcq_fx.cli.measures import Loaded, Material, Section, measuring
from lobcq_fx.cli.texts import sentences
from lobcq_fx.evaluation import SentencePair, cosine_similarity, sentence_embeddings, sentences_of, sts

LONGEST_SENTENCE = 256


@dataclass(frozen=True)
class Encoders:
    """models: the one to measure, then what to compare it with, if anything. batch_size: sentences in one call."""

    models: Sequence[Loaded]
    batch_size: int | None
    progress: ProgressBars

    def cosines(self, text: Material[str]) -> Section:
        """How close the embeddings of a text's lines lie to the other model's."""
        with measuring(text.source) as watch:
            lines = sentences(text.content)
            together = cosine_similarity(*self._embeddings(lines)).to_dict()
        return Section(
            "cosine", text.source, self._settings(len(lines)), [{} for _ in self.models], watch.seconds, together
        )

    def sts(self, pairs: Material[list[SentencePair]]) -> Section:
        """How each model's cosines rank pairs of sentences, and how close the embeddings lie to the other model's."""
        with measuring(pairs.source) as watch:
            embeddings = self._embeddings(sentences_of(pairs.content))
            figures = [sts(one, pairs.content).to_dict() for one in embeddings]
            together = cosine_similarity(*embeddings).to_dict() if len(embeddings) == 2 else {}
        return Section("sts", pairs.source, self._settings(len(pairs.content)), figures, watch.seconds, together)

    def _embeddings(self, lines: list[str]) -> list[Tensor]:
        return [
            sentence_embeddings(
                one.model,
                one.tokenizer,
                lines,
                batch_size=self.batch_size or 32,
                max_length=self._max_length,
                progress=self.progress.titled(f"Embed with {one.name}"),
            )
            for one in self.models
        ]

    def _settings(self, items: int) -> dict[str, Any]:
        return {"items": items, "max_length": self._max_length}

    @property
    def _max_length(self) -> int:
        return min(LONGEST_SENTENCE, *(one.max_length or LONGEST_SENTENCE for one in self.models))
