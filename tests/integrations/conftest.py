"""What every test here may share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _traced_once(traced_once: None) -> None:
    """Few float models are quantized here again and again, with other settings."""
