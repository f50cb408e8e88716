"""Exports whose self-check can be asked again, about files with a fault."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import lobcq_fx
from lobcq_fx.export import export_onnx, folder
from lobcq_fx.export.folder import ExportSummary
from lobcq_fx.export.metadata import MODEL
from lobcq_fx.export.self_check import check_sessions


@dataclass(frozen=True)
class Checked:
    """An export, what it said, and what its self-check compared the file with."""

    folder: Path
    summary: ExportSummary
    reference: tuple[Any, ...]

    def check_with_a_scale_off(self, name: str, path: Path) -> None:
        """Check a copy, written to `path`, in which one tensor scale is a percent larger."""
        model = ir.load(self.folder / MODEL)
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=value.name)
        ir.save(model, path)
        check_sessions(path, *self.reference)


def export_checked(q: lobcq_fx.QuantizedModel, out: Path, example: Any) -> Checked:
    references: list[Any] = []

    def check(path: Path, *reference: Any) -> Any:
        references.extend(reference)
        return check_sessions(path, *reference)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "check_sessions", check)
        summary = export_onnx(q, out, example)
    return Checked(out, summary, tuple(references))
