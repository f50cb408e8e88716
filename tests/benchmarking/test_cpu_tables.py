"""The README's section on speed, from results that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pages import readme
from benchmarks.pages.cpu_tables import cpu_section


def row(shape: str, rows: int, name: str, speedup: float) -> dict:
    reading = {"gb_per_second": 10 * speedup, "read_share": speedup / 10} if rows == 1 else {}
    found = {"shape": shape, "rows": rows, "format": name, "gmac_per_second": 100 * speedup, **reading}
    return {**found, "speedups": {"torch fp32": speedup} | ({"ORT int4": 1.0} if shape == "2x2" else {})}


def run(threads: int) -> dict:
    shapes = (("2x2", 2.0), ("4x4", 3.0))
    rates = {"weight_scalars_per_second": 5e8, "repack_scalars_per_second": 6e8, "activation_ns_per_scalar": 1.25}
    return {
        "threads": threads,
        "mode": "w4a4",
        "machine": {"cpu": "A CPU", "isa": "avx2", "versions": {"torch": "2.0", "torchao": None}},
        "results": [
            row(shape, rows, name, factor * threads)
            for shape, factor in shapes
            for rows in (1, 8, 64, 512)
            for name in ("8x64", "16x64")
        ],
        "encoding": {"8x64": rates, "16x64": rates},
        "not_run": [{"peer": "torchao int8", "shape": "2x2", "reason": "not installed: torchao"}],
    }


def test_ranges_over_the_shapes_one_thread_beside_all() -> None:
    section = cpu_section({"runs": [run(1), run(2)]})
    assert "N x K = 2x2, 4x4, 1 thread / 2 threads. A CPU, instruction set avx2; torch 2.0:" in section
    assert "| torch fp32 |" + " 2.0-3.0x / 4.0-6.0x |" * 4 in section
    assert "| ORT int4 |" + " 1.0x / 1.0x |" * 4 in section
    rates = "20.0-30.0 / 40.0-60.0 | 20-30 % / 40-60 % | 200-300 / 200-300 | 1.25 / 1.25 | 500 / 500 | 600 / 600 |"
    assert f"| 8x64 | {rates}" in section
    assert f"| 16x64 | {rates}" in section
    assert section.endswith("Not run: torchao int8 (not installed: torchao).")


def test_what_was_not_measured_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.cpu() == "Not measured yet."
