"""The results of `lobcq eval` as one table, which 80 columns hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lobcq_fx.cli.measures import Section

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


def print_scores(models: list[dict[str, Any]], sections: list[Section]) -> None:
    """On standard output: what is compared, then the table."""
    console = Console(highlight=False)
    names = [f"[bold]{escape(one['model'])}[/] ({_weights(one)})" for one in models]
    console.print(" against ".join(names), soft_wrap=True)
    table = Table()
    table.add_column("Measure")
    for title in ("Model", "Against", "Change")[: 1 if len(models) == 1 else 3]:
        table.add_column(title, justify="right", no_wrap=True)
    for section in sections:
        table.add_row(f"[bold]{escape(Path(section.source).name)}[/]: {_extent(section)}")
        for row in ROWS[section.kind]:
            if cells := _cells(row, section):
                table.add_row(f"  {row.title}", *cells)
        table.add_section()
    console.print(table)


def _weights(model: Figures) -> str:
    return "LO-BCQ" if model["quantized"] else "float"


def _extent(section: Section) -> str:
    """How much was measured, and by which windows."""
    settings = section.settings
    if section.kind == "text":
        return f"{settings['tokens']:,} tokens, window {settings['window']}, stride {settings['stride']}"
    return f"{settings['items']:,} {ITEMS[section.kind]}"


def _cells(row: Row, section: Section) -> list[str]:
    """Of the model, of what it is compared with, and the change; none where there is nothing to compare with."""
    if row.together:
        return [row.shown(section.together, row.key)] if section.together else []
    cells = [row.shown(one, row.key) for one in section.models]
    if len(cells) == 2 and row.change is not None:
        cells.append(row.change(section.models[0][row.key], section.models[1][row.key]))
    return cells
