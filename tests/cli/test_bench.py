from __future__ import annotations

import json
import subprocess

import pytest

from lobcq_fx.benchmarking.peers import PEERS
from lobcq_fx.kernels.bind import bind_cpu_core
from lobcq_fx.kernels.cpu.installed import SWITCH, cpu_core
from tests.cli.conftest import Run
from tests.cli.processes import fork

needs_core = pytest.mark.skipif(not bind_cpu_core(), reason="the CPU core was not built, or is switched off")
QUICK = ("--rounds", "1", "--threads", "1")

RESULT = {
    "shape": str,
    "rows": int,
    "format": str,
    "seconds": float,
    "gmac_per_second": float,
    "weight_bytes": int,
    "cold": bool,
    "peer_seconds": dict,
    "speedups": dict,
}
READING = {"gb_per_second": float, "read_gb_per_second": float, "read_share": float}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: ONNX Runtime's shared pool, once made, is every later session's, for good."""
    result = fork("bench", *arguments, *QUICK)
    assert result.returncode == 0, result.stderr
    return result


@needs_core
def test_json() -> None:
    shapes = ("--shape", "32x128", "--shape", "16x256")
    formats = ("--format", "8x64", "--format", "16x128")
    found = json.loads(bench(*shapes, "--rows", "1", "--rows", "9", *formats, "--json").stdout)
    assert (found["mode"], found["threads"], found["rounds"]) == ("w4a4", 1, 1)
    assert found["machine"]["isa"] == cpu_core().isa
    assert found["machine"]["cpu"]
    assert found["machine"]["versions"]["torch"]
    assert set(found["load_average"]) == {"before", "after"}
    combinations = [(row["shape"], row["rows"], row["format"]) for row in found["results"]]
    assert combinations == [
        (shape, rows, name) for shape in ("32x128", "16x256") for rows in (1, 9) for name in ("8x64", "16x128")
    ]
    installed = {peer.name for peer in PEERS if not peer.missing}
    for row in found["results"]:
        assert {key: type(value) for key, value in row.items()} == RESULT | (READING if row["rows"] == 1 else {})
        assert set(row["speedups"]) == set(row["peer_seconds"]) == installed
    assert {one["peer"] for one in found["not_run"]} == {peer.name for peer in PEERS} - installed
    assert all(one["reason"].startswith("not installed: ") for one in found["not_run"])


@needs_core
def test_the_table_people_see() -> None:
    """No number is cut off at 80 columns, which it is printed in where there is no terminal."""
    result = bench("--shape", "16x72", "--rows", "1", "--rows", "512", "--format", "16x128", "--mode", "w4a16")
    for words in (
        "W4A16 on ",
        f"instruction set {cpu_core().isa}, 1 thread;",
        "16x72, 16x128, ms",
        "M = 512",
        "GMAC/s",
    ):
        assert words in result.stdout, words
    for peer in PEERS:
        if not peer.missing and "int4" not in peer.name:
            (line,) = (one for one in result.stdout.splitlines() if one.startswith(f"│   {peer.name} "))
            assert line.count("x │") == 2, line
    table = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table)
    # 72 columns are no whole group of the 4-bit peers.
    assert "Not run on 16x72: torch int4 (K = 72 is no multiple of its group of 128)" in result.stdout
    assert "may be found in a cache" in result.stdout
    for peer in PEERS:
        if peer.missing:
            assert f"Not run: {peer.name} (not installed: {', '.join(peer.missing)})" in result.stdout
    assert "Check and time" in result.stderr


@pytest.mark.parametrize("shape", ["4096", "4096x", "0x64", "64x-1", "64 x 64", "1x2x3", "axb"])
def test_a_malformed_shape(lobcq: Run, shape: str) -> None:
    message = lobcq.refused("bench", f"--shape={shape}", code=2)
    assert f"--shape {shape}: write NxK" in message
    assert "4096x11008" in message


def test_settings_that_cannot_be(lobcq: Run) -> None:
    assert "8x64" in lobcq.refused("bench", "--format", "8by64", code=2)
    assert "w4a16" in lobcq.refused("bench", "--mode", "w4", code=2)
    for option in ("--rows", "--threads", "--rounds"):
        assert option in lobcq.refused("bench", option, 0, code=2)


def test_without_a_core_there_is_nothing_to_measure() -> None:
    result = fork("bench", "--shape", "64x64", **{SWITCH: "0"})
    assert result.returncode == 3
    assert result.stdout == ""
    assert "lobcq: there is no C++ core to measure" in result.stderr
    assert f"unset {SWITCH}" in result.stderr
