"""The closed list of operators that a saved graph may call, reviewed one by one: `benchmarks/quality/operators.py`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "operators.txt"

REMEDY = (
    "Remedy: compute it by other operators in the module, or ask for it to be added to the list in"
    " lobcq_fx/storage/operators.txt"
)

_UNSAFE = {
    "embedding_bag": "torch reads out of bounds where an offset is negative",
    "_grouped_mm": "torch reads out of bounds where an offset is too large",
    "repeat_interleave": "the size of its result follows from a tensor's values",
    "as_strided": "it looks at memory wherever it likes",
}
"""Operators that users may miss, and what keeps them off the list."""


@cache
def allowed() -> frozenset[str]:
    """Names such as `ops.aten.add.Tensor`."""
    return frozenset(FILE.read_text(encoding="utf-8").split())


def explain(name: str) -> str:
    """Why an operator is not on the list, and what to do."""
    parts = name.split(".")
    packet = parts[2] if len(parts) == 4 else name
    reason = next((f": {text}" for start, text in _UNSAFE.items() if packet.startswith(start)), "")
    return f"{name}, which is not among the operators a saved graph may call{reason}. {REMEDY}"
