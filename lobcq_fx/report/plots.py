"""The report's plots: matplotlib figures as inline SVG whose colours follow the page's theme."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from lobcq_fx.format.spec import ENTRY_MAX
from lobcq_fx.inventory import Inventory, MatmulRecord, readable_size

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
"""Numbers along the axis of blocks; more would run into each other."""

LEAST_SPAN = 6.0
"""Of a scale, in dB: half the error's amplitude. Smaller differences are to look small."""

FAINT = 0.08
"""Opacity of the best layer's field; the worst's is 1 where they are `LEAST_SPAN` apart, or more."""

MAX_NAMED = 40
"""Layers outside of repeated blocks that are drawn, a line each; the worst, if there are more."""

LONGEST_NAME = 34

OPERANDS = {"weight": WEIGHTS, "activation": ACTIVATIONS}
_MARKS = {"weight": "o", "activation": "D"}


def error_by_layer(records: Sequence[MatmulRecord]) -> str:
    """SVG: SQNR in dB of every quantized layer; weights and, where measured, activations.

    Layers of repeated blocks are fields of a map, blocks across and what they consist of down, the darker the more
    error. The others are dots on a line each. Each has its layer's name and value as a tooltip; records without a
    finite value draw nothing.
    """
    blocks = Blocks.of(records)
    single = [(index, record) for index, record in enumerate(records) if index not in blocks.places]
    single = sorted(sorted(single, key=lambda one: one[1].least_sqnr_db)[:MAX_NAMED])
    maps = [operand for operand in OPERANDS if blocks.places and _values(records, operand, blocks.places)]
    heights = [0.75 + 0.235 * len(blocks.parts)] * len(maps) + ([0.75 + 0.25 * len(single)] if single else [])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, sum(heights) or 1), layout="constrained")
        if not heights:
            return _svg(figure, "sqnr", {})
        panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        tooltips: dict[str, str] = {}
        for axes, operand in zip(panels, maps, strict=False):
            _draw_map(axes, records, blocks, operand, tooltips)
        if single:
            _draw_single(panels[-1], single, tooltips)
        return _svg(figure, "sqnr", tooltips)


@dataclass(frozen=True)
class Blocks:
    """The blocks that a model repeats most, `model.layers.0`, `.1`, ..., and what each consists of.

    name: `layers`. numbers: of the blocks. parts: `self_attn.q_proj`, ..., in the model's order.
    places: by a record's index its part's and its block's place in those.
    """

    name: str
    numbers: list[int]
    parts: list[str]
    places: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, records: Sequence[MatmulRecord]) -> Blocks:
        """No places where nothing is repeated."""
        found = {index: match for index, one in enumerate(records) if (match := _BLOCK.fullmatch(one.layer))}
        counts = Counter(match["stack"] for match in found.values())
        stack = max(counts, key=counts.__getitem__, default="")
        mine = {index: match for index, match in found.items() if match["stack"] == stack}
        numbers = sorted({int(match["number"]) for match in mine.values()})
        if len(numbers) < 2:
            return cls("", [], [], {})
        parts = list(dict.fromkeys(match["part"] for match in mine.values()))
        places = {i: (parts.index(one["part"]), numbers.index(int(one["number"]))) for i, one in mine.items()}
        return cls(stack.rpartition(".")[2], numbers, parts, places)


_BLOCK = re.compile(r"(?P<stack>[^.\d][^\d]*?)\.(?P<number>\d+)\.(?P<part>.+)")


def _values(records: Sequence[MatmulRecord], operand: str, indices: Iterable[int]) -> dict[int, float]:
    """What was measured and is finite, by the record's index."""
    found = {index: getattr(records[index], f"{operand}_sqnr_db") for index in indices}
    return {index: value for index, value in found.items() if value is not None and math.isfinite(value)}


def _draw_map(
    axes: Any, records: Sequence[MatmulRecord], blocks: Blocks, operand: str, tooltips: dict[str, str]
) -> None:
    values = _values(records, operand, blocks.places)
    best, worst = max(values.values()), min(values.values())
    span = max(best - worst, LEAST_SPAN)
    for index, value in values.items():
        row, column = blocks.places[index]
        name, opacity = f"{operand}-{index}", FAINT + (1 - FAINT) * (best - value) / span
        field = Rectangle((column - 0.46, row - 0.43), 0.92, 0.86, color=OPERANDS[operand], alpha=opacity, linewidth=0)
        field.set_gid(name)
        axes.add_patch(field)
        tooltips[name] = f"{records[index].layer}: {operand} {value:.2f} dB"
    for row in range(len(blocks.parts)):
        mine = [value for index, value in values.items() if blocks.places[index][0] == row]
        text = f"{min(mine):.1f} to {max(mine):.1f}" if mine else "-"
        axes.text(len(blocks.numbers) - 0.35, row, text, va="center", color=MUTED, fontsize=10)
    axes.text(len(blocks.numbers) - 0.35, -0.9, "dB", va="center", color=MUTED, fontsize=10)
    step = math.ceil(len(blocks.numbers) / MAX_TICKS)
    axes.set_xticks(range(0, len(blocks.numbers), step), [str(number) for number in blocks.numbers[::step]])
    axes.set_yticks(range(len(blocks.parts)), [_short(part, blocks.parts) for part in blocks.parts])
    axes.set_xlim(-0.6, len(blocks.numbers) * 1.13)  # room for the ranges
    axes.set_ylim(len(blocks.parts) - 0.5, -0.6)
    axes.set_xlabel(blocks.name, loc="left")
    scale = f"{operand}s: {worst:.1f} to {best:.1f} dB; full colour is {best - span:.1f} dB"
    axes.set_title(scale, loc="left", fontsize=11)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(part: str, parts: Sequence[str]) -> str:
    """The last of a part's names, or as many as tell it from the others."""
    names = part.split(".")
    for count in range(1, len(names)):
        short = ".".join(names[-count:])
        if sum(other == short or other.endswith(f".{short}") for other in parts) == 1:
            return short
    return part


def _ellipsis(layer: str) -> str:
    """The end of a long name: what is before it is the same of many."""
    return layer if len(layer) <= LONGEST_NAME else f"…{layer[1 - LONGEST_NAME :]}"


def _draw_single(axes: Any, records: Sequence[tuple[int, MatmulRecord]], tooltips: dict[str, str]) -> None:
    shown: list[float] = []
    for row, (index, record) in enumerate(records):
        axes.axhline(row, color=GRID, linewidth=0.8, zorder=1)
        for operand, color in OPERANDS.items():
            value = getattr(record, f"{operand}_sqnr_db")
            if value is None or not math.isfinite(value):
                continue
            name = f"{operand}-{index}"
            axes.plot([value], [row], _MARKS[operand], color=color, markersize=6.5, gid=name, zorder=2)
            tooltips[name] = f"{record.layer}: {operand} {value:.2f} dB"
            shown.append(value)
    axes.set_yticks(range(len(records)), [_ellipsis(record.layer) for _, record in records])
    axes.set_ylim(len(records) - 0.5, -0.5)
    if shown:
        centre, half = (min(shown) + max(shown)) / 2, max(max(shown) - min(shown), LEAST_SPAN) / 2
        axes.set_xlim(centre - 1.1 * half, centre + 1.1 * half)
        marks = [Line2D([], [], color=color, marker=_MARKS[name], linestyle="") for name, color in OPERANDS.items()]
        titles = [f"{name}s" for name in OPERANDS]
        axes.legend(marks, titles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handletextpad=0.2)
    axes.set_xlabel("SQNR in dB (higher is better)")
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


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
