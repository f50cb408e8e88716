"""Put a report's content and plots into the page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lobcq_fx.format.spec import BLOCK_SIZE, CODE_BITS, SCALE_BITS
from lobcq_fx.inventory import readable_size
from lobcq_fx.model import QuantizedModel
from lobcq_fx.report import plots
from lobcq_fx.report.content import ReportContent
from lobcq_fx.report.scores import tables
from lobcq_fx.storage.atomic_file import write_whole

TEMPLATE = "report.html.j2"


def write_page(
    model: QuantizedModel | str | os.PathLike[str], path: str | os.PathLike[str], scores: Mapping[str, Any] | None
) -> None:
    """`write_report`, once what it needs is there."""
    content = (
        ReportContent.of_model(model) if isinstance(model, QuantizedModel) else ReportContent.of_folder(Path(model))
    )
    write_whole(Path(path), render(replace(content, scores=scores)))


def render(content: ReportContent) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("lobcq_fx.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=readable_size, db=_decibels, percent=lambda share: f"{100 * share:.1f} %")
    inventory = content.inventory
    return environment.get_template(TEMPLATE).render(
        content=content,
        inventory=inventory,
        bits=_bits(content),
        worst=inventory.worst(1),
        activations_measured=any(record.activation_sqnr_db is not None for record in inventory.quantized),
        outside=inventory.parameters_outside_matmuls,
        reasons=inventory.left_alone_by_reason,
        scores=None if content.scores is None else tables(content.scores),
        settings=_settings(content.config.to_dict()),
        # Our own SVG: everything that came from outside was escaped while it was drawn.
        sqnr_plot=Markup(plots.error_by_layer(inventory.quantized)),
        size_plot=Markup(plots.size_bars(inventory)),
        codebook_plots={name: Markup(plots.codebook_strips(c)) for name, c in content.codebooks.items()},
    )


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
