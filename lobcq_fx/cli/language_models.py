"""What `lobcq eval` measures of language models, one or two of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lobcq_fx.cli.console import ProgressBars
from lobcq_fx.cli.failures import InputError
from lobcq_fx.cli.measures import Loaded, Material, Section, measuring
from lobcq_fx.cli.texts import token_ids
from lobcq_fx.evaluation import Question, divergence, last_word, leading_bos, multiple_choice, perplexity, same_choices


@dataclass(frozen=True)
class Windows:
    """Tokens: of a window, and from one window to the next."""

    window: int
    stride: int


def common_token_ids(tokenizers: Sequence[Any], text: Material[str], max_tokens: int | None) -> Tensor:
    """The first tokens of a text, which have to be the same for each tokenizer, int64 [N].

    Raises:
        InputError: they are not, or fewer than two.
    """
    first, *others = [token_ids(one, text.content)[:max_tokens] for one in tokenizers]
    if any(first.tolist() != other.tolist() for other in others):
        raise InputError(
            f"the two tokenizers make different tokens of {text.source}, so that their models' perplexities cannot be"
            " compared: copy the float model's tokenizer files, or leave --against out"
        )
    if len(first) < 2:
        raise InputError(f"{text.source}: the text is too short: {len(first)} tokens leave nothing to predict")
    return first


@dataclass(frozen=True)
class LanguageModels:
    """models: the one to measure, then what to compare it with, if anything. batch_size: None for the default."""

    models: Sequence[Loaded]
    batch_size: int | None
    progress: ProgressBars

    def text(self, source: str, ids: Tensor, windows: Windows) -> Section:
        """Perplexity of each model; of two, how far the first one's predictions lie from the other's."""
        first = self.models[0]
        bos = leading_bos(first.tokenizer)
        settings = {"window": windows.window, "stride": windows.stride, "bos_token_id": bos}
        call: dict[str, Any] = {**settings, "batch_size": self.batch_size or 1}
        with measuring(source) as watch:
            if len(self.models) == 1:
                title = self.progress.titled(f"Score {first.name}: {_short(source)}")
                results, together = [perplexity(first.model, ids, progress=title, **call)], {}
            else:
                title = self.progress.titled(f"Compare predictions: {_short(source)}")
                found = divergence(first.model, self.models[1].model, ids, progress=title, **call)
                results = [found.model, found.reference]
                together = {
                    "perplexity_ratio": found.perplexity_ratio,
                    "kl_divergence": found.kl_divergence,
                    "top1_agreement": found.top1_agreement,
                }
        figures = [
            {"perplexity": one.perplexity, "negative_log_likelihood": one.negative_log_likelihood} for one in results
        ]
        return Section("text", source, {**settings, "tokens": results[0].tokens}, figures, watch.seconds, together)

    def questions(self, asked: Material[list[Question]]) -> Section:
        """Multiple choice; of two models, how often they choose the same."""
        with measuring(asked.source) as watch:
            found = self._of_each("Questions", asked.content, multiple_choice)
            together = {"same_choices": same_choices(*found)} if len(found) == 2 else {}
        figures = [one.to_dict() for one in found]
        return Section("multiple_choice", asked.source, self._settings(asked), figures, watch.seconds, together)

    def last_words(self, texts: Material[list[str]]) -> Section:
        """Last words of texts."""
        with measuring(texts.source) as watch:
            figures = [one.to_dict() for one in self._of_each("Last words", texts.content, last_word)]
        return Section("last_word", texts.source, self._settings(texts), figures, watch.seconds)

    def _of_each(self, title: str, items: list[Any], function: Callable[..., Any]) -> list[Any]:
        return [
            function(
                one.model,
                one.tokenizer,
                items,
                max_length=self._max_length,
                batch_size=self.batch_size or 8,
                progress=self.progress.titled(f"{title}: {one.name}"),
            )
            for one in self.models
        ]

    def _settings(self, items: Material[list[Any]]) -> dict[str, Any]:
        return {"items": len(items.content), "max_length": self._max_length}

    @property
    def _max_length(self) -> int | None:
        """The same for both, so that they read the same context."""
        return min((one.max_length for one in self.models if one.max_length), default=None)


def _short(source: str) -> str:
    return source.rsplit("/", 1)[-1]
