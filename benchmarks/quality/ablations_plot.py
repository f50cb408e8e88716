"""Draws error against bits, and how fits converge, from the rows that ablations.py measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.quality.format_quality_plot import MUTED, OURS, STYLE, quiet

STYLES = {
    "codebooks N_c": (OURS, "o", "N_c 1, 2, 4, 8, 16"),
    "block length L_b": ("#3f7d20", "D", "L_b 32, 16, 8, 4, 2"),
    "array length L_A": ("#c2410c", "s", "L_A 128, 64, 32, 16"),
}
OPERANDS = ("weights", "activations")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels of errors, one for each operand, and one of the fit's progress; rows as in ablations.json."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.4))
        for axis, operand in zip(axes, OPERANDS, strict=False):
            _errors(axis, rows, operand)
        _convergence(axes[2], rows)
        axes[0].set_ylabel("signal to quantization noise (dB)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower left", ncols=3, frameon=False, fontsize=9.5, bbox_to_anchor=(0.05, 0))
        figure.suptitle("What each part of the format is worth", x=0.055, ha="left", fontsize=14, fontweight="bold")
        figure.subplots_adjust(left=0.055, right=0.985, top=0.83, bottom=0.21, wspace=0.2)
        figure.savefig(path, dpi=160, facecolor="white")
        plt.close(figure)


def _errors(axis: Axes, rows: list[dict[str, Any]], operand: str) -> None:
    for ablation, (color, marker, label) in STYLES.items():
        found = sorted((row for row in rows if row["ablation"] == ablation), key=lambda row: row["bits"])
        bits = [row["bits"] for row in found]
        axis.plot(bits, [-10 * math.log10(row[operand]) for row in found], color=color, marker=marker, label=label)
    axis.set_title(operand, loc="left", fontsize=11)
    axis.set_xlabel("bits a scalar, scales and selectors included")
    quiet(axis)


def _convergence(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["ablation"] == "start of the fit":
            color = OURS if row["start"] == "k-means++" else MUTED
            axis.plot(range(len(row["history"])), row["history"], color=color, label=row["start"])
    axis.set_title("mean squared error of the fit", loc="left", fontsize=11)
    axis.set_xlabel("iterations")
    axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=9.5)
    quiet(axis)
