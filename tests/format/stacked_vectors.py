"""Writes stacked_vectors.json, the golden vectors of stacked weights: `python -m tests.format.stacked_vectors`.

The bytes come from the oracle, which shares no code with the package. What is in the file does not change: an
implementation of the format that gives other bytes is wrong.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.format import oracle
from tests.format.cases import codebooks_of, matrix

FILE = Path(__file__).with_name("stacked_vectors.json")
CASES = (("8x64", 3, 2, 72), ("2x16", 2, 3, 20), ("16x32", 4, 1, 33), ("1x128", 1, 2, 130))
"""Format, E, N, K."""


def case(name: str, experts: int, rows: int, columns: int) -> dict[str, object]:
    number, array_size = map(int, name.split("x"))
    codebooks = codebooks_of(number, number)
    kinds = ("normal", "heavy", "sparse", "mixed magnitudes")
    stack = [matrix(kinds[index % 4], rows, columns, index) * np.float32(10.0**-index) for index in range(experts)]
    packed = [oracle.encode(one, array_size, codebooks) for one in stack]
    return {
        "format": name,
        "codebooks": codebooks,
        "x": [_bits(one) for one in stack],
        "codes": [one.codes for one in packed],
        "selectors": [one.selectors for one in packed],
        "scales": [one.scales for one in packed],
        "tensor_scale": _bits(np.array([one.tensor_scales[0] for one in packed])),
        "decoded": [_bits(one.decoded) for one in packed],
    }


def _bits(values: np.ndarray) -> object:
    return np.ascontiguousarray(values, np.float32).view(np.uint32).tolist()


if __name__ == "__main__":
    cases = ",\n".join(json.dumps(case(*one)) for one in CASES)
    FILE.write_text(f"[\n{cases}\n]\n", encoding="utf-8")
