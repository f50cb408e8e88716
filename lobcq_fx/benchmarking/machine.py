"""What a measurement was made on and with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lobcq_fx.benchmarking.ours import require_core

CPU_INFO = Path("/proc/cpuinfo")
PACKAGES = ("torch", "onnxruntime", "openvino", "torchao")


def machine() -> dict[str, Any]:
    """JSON-ready: the CPU, the core's instruction set, and versions (None where not installed)."""
    return {
        "cpu": cpu_name(),
        "isa": require_core().isa,
        "versions": installed_versions(),
    }


def installed_versions() -> dict[str, str | None]:
    """Of what computes, ours excepted; None where it is not installed."""
    return {package: installed_version(package) for package in PACKAGES}


def cpu_name() -> str:
    """The processor's model, where Linux tells it; its architecture elsewhere."""
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def installed_version(package: str) -> str | None:
    """Of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
