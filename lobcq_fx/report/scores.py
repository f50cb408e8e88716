"""What `lobcq eval` found, as lines of text for a table: on a terminal, or on a report's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lobcq_fx.errors import ReportError

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One figure. together: it is of two models, not of each. change: how the second model's becomes the first's."""

    title: str
    key: str
    shown: Callable[[Figures, str], str]
    together: bool = False
    change: Callable[[float, float], str] | None = None


def _number(figures: Figures, key: str) -> str:
    return f"{figures[key]:.4f}"


def _small(figures: Figures, key: str) -> str:
    return f"{figures[key]:.4g}"


def _share(figures: Figures, key: str) -> str:
    error = figures.get(f"{key}_stderr", math.nan)
    return f"{100 * figures[key]:.1f}{'' if math.isnan(error) else f' ± {100 * error:.1f}'} %"


def _relative(one: float, other: float) -> str:
    return f"{100 * (one / other - 1):+.2f} %"


def _points(one: float, other: float) -> str:
    return f"{100 * (one - other):+.1f} points"


def _difference(one: float, other: float) -> str:
    return f"{one - other:+.4f}"


COSINES = (
    Row("Mean cosine", "mean_cosine", _number, together=True),
    Row("Least cosine", "min_cosine", _number, together=True),
)
ROWS: Mapping[str, tuple[Row, ...]] = {
    "text": (
        Row("Perplexity", "perplexity", _number, change=_relative),
        Row("KL divergence, nats", "kl_divergence", _small, together=True),
        Row("Same likeliest token", "top1_agreement", _share, together=True),
    ),
    "multiple_choice": (
        Row("Right (acc)", "acc", _share, change=_points),
        Row("Right by length (acc_norm)", "acc_norm", _share, change=_points),
        Row("Same choice, right or wrong", "same_choices", _share, together=True),
    ),
    "last_word": (
        Row("Last word right (acc)", "acc", _share, change=_points),
        Row("Perplexity of a word", "perplexity", _number, change=_relative),
    ),
    "cosine": COSINES,
    "sts": (Row("Spearman, cosines to scores", "spearman", _number, change=_difference), *COSINES),
}

ITEMS = {"multiple_choice": "questions", "last_word": "texts", "cosine": "lines", "sts": "pairs"}


def titles(count: int) -> tuple[str, ...]:
    """Of the columns of figures, for one model or for two."""
    return ("Model", "Against", "Change")[: 1 if count == 1 else 3]


def weights_of(model: Figures) -> str:
    """Of a model that was measured: what its weights are in."""
    return "LO-BCQ" if model["quantized"] else "float"


def heading(section: Figures) -> str:
    """What a section was measured on, and how much of it; a section as `lobcq eval` writes it."""
    settings = section["settings"]
    amount = f"{settings['items']:,} {ITEMS[section['kind']]}" if section["kind"] in ITEMS else ""
    if section["kind"] == "text":
        amount = f"{settings['tokens']:,} tokens, window {settings['window']}, stride {settings['stride']}"
    return f"{Path(section['source']).name}: {amount}"


def lines(section: Figures) -> list[tuple[str, list[str]]]:
    """The title of each figure, and its text of the model, of what it is compared with, and of the change."""
    return [(row.title, cells) for row in ROWS[section["kind"]] if (cells := _cells(row, section))]


def tables(scores: Figures) -> tuple[tuple[str, ...], list[tuple[str, list[tuple[str, list[str]]]]]]:
    """Titles of columns, and for each section its heading and lines, of the JSON that `lobcq eval -o` writes.

    Raises:
        ReportError: it is none.
    """
    try:
        return titles(len(scores["models"])), [(heading(one), lines(one)) for one in scores["results"]]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"the scores are not what `lobcq eval -o FILE` writes: {type(error).__name__}: {error}"
        ) from None


def _cells(row: Row, section: Figures) -> list[str]:
    """Of the model, of what it is compared with, and the change; none where there is nothing to compare with."""
    if row.together:
        return [row.shown(section["together"], row.key)] if section["together"] else []
    cells = [row.shown(one, row.key) for one in section["models"]]
    if len(cells) == 2 and row.change is not None:
        cells.append(row.change(section["models"][0][row.key], section["models"][1][row.key]))
    return cells
