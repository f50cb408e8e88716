"""The report's plots: matplotlib figures as inline SVG whose colours follow the page's theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from lobcq_fx.format.spec import ENTRY_MAX
from lobcq_fx.inventory import Inventory, MatmulRecord
from lobcq_fx.report.layers import readable_size

# matplotlib wants numbers for colours and the page wants CSS variables: each stand-in below is drawn, then replaced.
INK, MUTED, GRID, BAND = "#010201", "#010202", "#010203", "#010204"
WEIGHTS, ACTIVATIONS, FLOAT = "#010205", "#010206", "#010207"
CSS_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    BAND: "--band",
    WEIGHTS: "--weights",
    ACTIVATIONS: "--activations",
    FLOAT: "--float",
}

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lobcq",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}

MAX_TICKS = 16
"""Names along the axis of layers; more would run into each other."""


def sqnr_by_layer(records: Sequence[MatmulRecord]) -> str:
    """SVG: SQNR in dB of every quantized layer, in the model's order; weights and, where measured, activations.

    Points carry their layer's name and value as a tooltip. Records without a finite value draw no point.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.7), layout="constrained")
        axes = figure.subplots()
        blocks = [(name, [index for index, _ in group]) for name, group in _by_block(records)]
        for number, (_, positions) in enumerate(blocks):
            if number % 2 and len(blocks) > 1:
                axes.axvspan(positions[0] - 0.5, positions[-1] + 0.5, color=BAND, linewidth=0)
        tooltips: dict[str, str] = {}
        _draw_series(axes, records, "weight", WEIGHTS, tooltips)
        _draw_series(axes, records, "activation", ACTIVATIONS, tooltips)
        shown = blocks[:: math.ceil(len(blocks) / MAX_TICKS)] if blocks else []
        axes.set_xticks([sum(p) / len(p) for _, p in shown], [name for name, _ in shown])
        axes.set_xlim(-0.5, max(len(records), 1) - 0.5)
        axes.set_ylabel("SQNR in dB (higher is better)")
        axes.grid(axis="x", visible=False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handletextpad=0.2)
        return _svg(figure, "sqnr", tooltips)


def codebook_strips(codebooks: Tensor) -> str:
    """SVG: codebooks int8 [N_c, 16], a row each, an entry a mark on the integers from -31 to 31."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 0.9 + 0.34 * len(codebooks)), layout="constrained")
        axes = figure.subplots()
        tooltips: dict[str, str] = {}
        for row, entries in enumerate(codebooks.tolist()):
            axes.plot([-ENTRY_MAX, ENTRY_MAX], [row, row], color=GRID, linewidth=1, zorder=1)
            name = f"codebook-{row}"
            axes.plot(entries, [row] * len(entries), "o", color=WEIGHTS, markersize=6.5, gid=name, zorder=2)
            tooltips[name] = f"codebook {row}: {', '.join(map(str, entries))}"
        axes.set_yticks(range(len(codebooks)), [str(row) for row in range(len(codebooks))])
        axes.set_ylim(len(codebooks) - 0.5, -0.5)
        axes.set_xlim(-ENTRY_MAX - 1, ENTRY_MAX + 1)
        axes.set_xticks([-31, -24, -16, -8, 0, 8, 16, 24, 31])
        axes.set_ylabel("codebook")
        axes.set_xlabel("entry, in steps of the block array's scale")
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        return _svg(figure, "codebooks", tooltips)


def size_bars(inventory: Inventory) -> str:
    """SVG: bytes of all parameters before and after, split into what is packed and what stays in float."""
    float_bytes = sum(record.float_bytes for record in inventory.quantized if record.packed_bytes)
    packed_bytes = sum(record.packed_bytes for record in inventory.quantized)
    # A tied weight that is still needed in float is stored twice, so the rest need not be the same before and after.
    rows = {
        "before": (float_bytes, inventory.model_float_bytes - float_bytes),
        "after": (packed_bytes, inventory.model_packed_bytes - packed_bytes),
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.75), layout="constrained")
        axes = figure.subplots()
        longest = max(1, *(sum(parts) for parts in rows.values()))
        for row, (label, (layers, rest)) in enumerate(rows.items()):
            axes.barh(row, layers, height=0.56, color=WEIGHTS, label="quantized layers" if not row else None)
            axes.barh(row, rest, left=layers, height=0.56, color=FLOAT, label="left in float" if not row else None)
            axes.text(layers + rest + longest * 0.01, row, readable_size(layers + rest), va="center", color=INK)
            axes.text(-longest * 0.01, row, label, va="center", ha="right", color=MUTED)
        axes.set_xlim(0, longest * 1.14)
        axes.set_ylim(1.5, -0.5)
        axes.axis("off")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handlelength=1, handleheight=1)
        return _svg(figure, "size", {})


def block_of(layer: str) -> str:
    """The repeated block a layer sits in, `"layers.3"` for `model.layers.3.mlp.up_proj`; else its first name."""
    parts = layer.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[max(0, index - 1) : index + 1])
    return parts[0]


def _by_block(records: Sequence[MatmulRecord]) -> Iterator[tuple[str, Iterator[tuple[int, MatmulRecord]]]]:
    return groupby(enumerate(records), key=lambda item: block_of(item[1].layer))


def _draw_series(
    axes: Any, records: Sequence[MatmulRecord], operand: str, color: str, tooltips: dict[str, str]
) -> None:
    points = [(index, getattr(record, f"{operand}_sqnr_db"), record) for index, record in enumerate(records)]
    points = [(index, value, record) for index, value, record in points if value is not None and math.isfinite(value)]
    if not points:
        return
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=color, linewidth=1, alpha=0.35)
    size = 6.5 if len(records) <= 100 else 4
    for number, (x, y, record) in enumerate(points):
        name = f"{operand}-{x}"
        label = f"{operand}s" if number == 0 else None
        axes.plot([x], [y], "o" if operand == "weight" else "D", color=color, markersize=size, gid=name, label=label)
        tooltips[name] = f"{record.layer}: {operand} {y:.2f} dB"


def _svg(figure: Any, prefix: str, tooltips: Mapping[str, str]) -> str:
    """The figure as an <svg> element: themed colours, tooltips, ids that do not clash with another figure's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, variable in CSS_VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    for name, tooltip in tooltips.items():
        text = text.replace(f'<g id="{name}">', f'<g id="{name}"><title>{escape(tooltip)}</title>', 1)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", text)
    # The page scales the plot to its column; the view box keeps the proportions.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
