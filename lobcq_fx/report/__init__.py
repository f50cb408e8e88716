"""The report: one self-contained HTML file about a quantized model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from lobcq_fx.errors import ReportError
from lobcq_fx.model import QuantizedModel

__all__ = ["write_report"]


def write_report(
    model: QuantizedModel | str | os.PathLike[str],
    path: str | os.PathLike[str],
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Write one HTML file that needs nothing else: plots, tables, style and script are inside it.

    Args:
        model: a quantized model, or the folder of a saved one (whose weights are not loaded).
        path: the file; replaced as a whole if it exists.
        scores: what `lobcq eval -o FILE` wrote of the model, if the page is to show it.

    Raises:
        ReportError: matplotlib or jinja2 is missing, or the scores are something else.
        CheckpointError: the folder is not a quantized model, or is damaged.
        OSError: the file cannot be written; an old one stays as it was.
    """
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            raise ReportError(f'the report needs {package}: pip install "lobcq-fx[report]"')
    from lobcq_fx.report.render import write_page

    write_page(model, path, scores)
