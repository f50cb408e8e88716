"""Put a report's content and plots into the page."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lobcq_fx.format.spec import BLOCK_SIZE, CODE_BITS, SCALE_BITS
from lobcq_fx.inventory import Inventory, MatmulRecord
from lobcq_fx.model import QuantizedModel
from lobcq_fx.report import plots
from lobcq_fx.report.content import ReportContent

TEMPLATE = "report.html.j2"


def write_report(model: QuantizedModel | str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write one HTML file that needs nothing else: plots, tables, style and script are inside it.

    Args:
        model: a quantized model, or the folder of a saved one (whose weights are not loaded).
        path: the file; replaced as a whole if it exists.

    Raises:
        CheckpointError: the folder is not a quantized model, or is damaged.
        OSError: the file cannot be written; an old one stays as it was.
    """
    content = (
        ReportContent.of_model(model) if isinstance(model, QuantizedModel) else ReportContent.of_folder(Path(model))
    )
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        unfinished.write_text(render(content), encoding="utf-8")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def render(content: ReportContent) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("lobcq_fx.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=plots.readable_size, db=_decibels, percent=lambda share: f"{100 * share:.1f} %")
    inventory = content.inventory
    return environment.get_template(TEMPLATE).render(
        content=content,
        inventory=inventory,
        bits=_bits(content),
        worst=worst_layers(inventory, 1),
        activations_measured=any(record.activation_sqnr_db is not None for record in inventory.quantized),
        outside=parameters_outside_matmuls(inventory),
        reasons=left_alone_by_reason(inventory),
        settings=_settings(content.config.to_dict()),
        # Our own SVG: everything that came from outside was escaped while it was drawn.
        sqnr_plot=Markup(plots.sqnr_by_layer(inventory.quantized)),
        size_plot=Markup(plots.size_bars(inventory)),
        codebook_plots={name: Markup(plots.codebook_strips(c)) for name, c in content.codebooks.items()},
    )


def worst_layers(inventory: Inventory, count: int) -> list[MatmulRecord]:
    """The quantized layers with the least SQNR, weights' and activations' taken together, worst first."""
    measured = [record for record in inventory.quantized if _least_sqnr(record) < math.inf]
    return sorted(measured, key=_least_sqnr)[:count]


def left_alone_by_reason(inventory: Inventory) -> dict[str, list[MatmulRecord]]:
    """The matmuls left in float under each reason, the reason with the most multiply-adds first."""
    groups: dict[str, list[MatmulRecord]] = defaultdict(list)
    for record in inventory.left_alone:
        groups[record.reason or ""].append(record)
    return dict(sorted(groups.items(), key=lambda item: -sum(record.macs for record in item[1])))


def parameters_outside_matmuls(inventory: Inventory) -> int:
    """Scalars in parameters that no matmul reads as its weight: embedding tables, norms, biases."""
    # A weight that serves several matmuls carries its bytes in the first record only.
    in_matmuls = sum(record.scalars for record in inventory.records if record.packed_bytes)
    return max(0, inventory.model_parameters - in_matmuls)


def _least_sqnr(record: MatmulRecord) -> float:
    values = (record.weight_sqnr_db, record.activation_sqnr_db)
    return min((value for value in values if value is not None), default=math.inf)


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if math.isfinite(value) else "exact"


def _bits(content: ReportContent) -> list[tuple[str, float]]:
    """What a stored scalar of the main format is made of, in bits."""
    spec = content.config.format
    parts = [
        ("codes", float(CODE_BITS)),
        ("selectors", spec.selector_bits / BLOCK_SIZE),
        ("scales", SCALE_BITS / spec.array_size),
    ]
    return [(name, bits) for name, bits in parts if bits]


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: _text(value) for key, value in config.items()}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
