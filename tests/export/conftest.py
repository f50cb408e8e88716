"""Language models exported once a session, for tests that leave the folders as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lobcq_fx
from lobcq_fx.export import export_onnx
from lobcq_fx.export.folder import ExportSummary, Target
from lobcq_fx.kernels.cpu.installed import cpu_core
from tests.families import causal_lm

CHANGES: dict[str, Any] = {"gpt2": {"n_embd": 64}, "gemma3": {"layer_types": ["sliding_attention"]}}
"""GPT-2's heads are 16 wide, which ONNX Runtime's attention takes."""


@dataclass(frozen=True)
class Exported:
    """A quantized language model of one layer, its folder and what the export said."""

    q: lobcq_fx.QuantizedModel
    folder: Path
    summary: ExportSummary


@pytest.fixture(scope="session")
def exported_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Exports of a family, with the op library where there is one; settings are `export_onnx`'s."""

    @cache
    def quantized(family: str, mode: str) -> lobcq_fx.QuantizedModel:
        model = causal_lm(family, num_hidden_layers=1, **CHANGES.get(family, {}))
        return lobcq_fx.quantize(model, config=lobcq_fx.LobcqConfig(mode=mode), static_cache=False)

    @cache
    def export(family: str, mode: str = "w4a4", target: Target = "custom", **settings: Any) -> Exported:
        folder, q = tmp_path_factory.mktemp(family) / "onnx", quantized(family, mode)
        settings["include_library"] = target == "custom" and cpu_core() is not None
        return Exported(q, folder, export_onnx(q, folder, target=target, **settings))

    return export
