"""What `lobcq bench --model` measured, as bars. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

INK, MUTED, OURS, OTHERS = "#1a1a1a", "#666666", "#3156d3", "#b8bec9"
STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "lobcq",
    "text.color": INK,
    "axes.edgecolor": OTHERS,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
PANELS = {"prefill_tokens_per_second": "prompt, tokens a second", "decode_tokens_per_second": "new tokens a second"}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write a picture of what `measure_models` returns: a bar a model, and marks where memory's speed ends decoding."""
    rows = found["results"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.3 + 0.45 * len(rows)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
            _bars(axes, rows, key, title)
        _marks(panels[1], rows)
        panels[0].set_yticks(range(len(rows)), [row["model"] for row in rows])
        panels[0].invert_yaxis()
        threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
        title = f"generate() behind {found['prompt_tokens']} tokens, {threads}, {found['cpu']}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(axes: Any, rows: list[Mapping[str, Any]], key: str, title: str) -> None:
    for place, row in enumerate(rows):
        axes.barh(place, row[key], height=0.6, color=OTHERS if place else OURS)
        axes.text(row[key], place, f" {row[key]:.1f}", va="center", color=INK)
    axes.set_xlim(0, 1.2 * max(row[key] for row in rows))
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(length=0)


def _marks(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    limits = [(place, row["roofline_tokens_per_second"]) for place, row in enumerate(rows) if "step_bytes" in row]
    for place, limit in limits:
        axes.plot([limit, limit], [place - 0.38, place + 0.38], color=INK, linewidth=1.5)
    if limits:
        axes.set_xlim(0, 1.1 * max(axes.get_xlim()[1] / 1.1, *(limit for _, limit in limits)))
        axes.set_xlabel("lines: as many as the speed of memory allows", loc="left")
