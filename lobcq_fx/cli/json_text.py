"""Results as JSON that strict readers accept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def json_text(values: Mapping[str, Any]) -> str:
    """One JSON object; NaN and infinity become null."""
    return json.dumps(_strict(values), indent=2)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
