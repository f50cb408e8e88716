"""Draws the plot of error against bits from the rows that format_quality.py measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TITLES = {"gaussian": "Gaussian", "laplace": "Laplace", "student-t4": "Student-t (4)"}
INK, MUTED, GRID = "#1b1f24", "#6e7781", "#e6e8eb"
OURS = "#0b6bcb"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
PEER_STYLES = {
    "MXFP4": ("#c2410c", "s"),
    "NVFP4": ("#3f7d20", "D"),
    "INT4 group 128": ("#7c3aed", "^"),
    "INT4 group 32": ("#7c3aed", "v"),
    "INT4 asymmetric group 32": ("#b794f4", "P"),
    "NF4 block 64": ("#b45309", "X"),
}
DEFAULT = "LO-BCQ 8x64"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a source, sharing both axes; rows as in format_quality.json."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.9), sharex=True, sharey=True)
        for axis, source in zip(axes, TITLES, strict=True):
            _panel(axis, rows, source)
        axes[0].set_ylabel("signal to quantization noise (dB)")
        axes[1].set_xlabel("bits a scalar, scales and selectors included")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9.5)
        figure.suptitle("4-bit formats: quality against size", x=0.055, ha="left", fontsize=14, fontweight="bold")
        figure.text(
            0.055,
            0.895,
            "round to nearest; the same universal LO-BCQ codebooks for all three sources; higher is better",
            color=MUTED,
        )
        figure.subplots_adjust(left=0.055, right=0.985, top=0.80, bottom=0.245, wspace=0.06)
        figure.savefig(path, dpi=160, facecolor="white")
        plt.close(figure)


def _panel(axis: Axes, rows: list[dict[str, Any]], source: str) -> None:
    ours = sorted((row for row in rows if row["format"].startswith("LO-BCQ")), key=lambda row: row["bits_per_scalar"])
    bits = [row["bits_per_scalar"] for row in ours]
    axis.plot(
        bits,
        [row["sqnr_db"][source] for row in ours],
        "o-",
        color=OURS,
        lw=2,
        ms=6,
        label="LO-BCQ (this package)",
        zorder=4,
    )
    for row in rows:
        if row["format"] in PEER_STYLES:
            color, marker = PEER_STYLES[row["format"]]
            point = (row["bits_per_scalar"], row["sqnr_db"][source])
            axis.plot(*point, marker, color=color, ms=8, mec="white", mew=0.8, label=row["format"], zorder=3)
    if source == "gaussian":
        ends = [4.08, 4.82]
        bound = [20 * math.log10(2) * end for end in ends]
        axis.plot(ends, bound, "--", color=MUTED, lw=1.3, label="rate-distortion bound (Gaussian)", zorder=2)
    default = next(row for row in ours if row["format"] == DEFAULT)
    point = (default["bits_per_scalar"], default["sqnr_db"][source])
    label = f"{point[1]:.1f} dB at 4.5 bits"
    axis.annotate(label, point, xytext=(-2, 9), textcoords="offset points", ha="right", fontsize=9.5, color=OURS)
    axis.set_title(TITLES[source], loc="left", fontsize=11, color=INK)
    axis.set_xlim(4.08, 4.82)
    quiet(axis)


def quiet(axis: Axes) -> None:
    """A light grid, and no frame but a line below."""
    axis.grid(color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
