"""The op library's place, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest

from lobcq_fx.errors import LobcqError
from lobcq_fx.export import library
from lobcq_fx.kernels.cpu import installed
from lobcq_fx.kernels.cpu.installed import SWITCH, cpu_core


@pytest.fixture(autouse=True)
def forget_core() -> Iterator[None]:
    """The core is looked up once a process; here anew for each test."""
    yield
    cpu_core.cache_clear()


def test_registers_with_onnxruntime() -> None:
    if cpu_core() is None:
        pytest.skip("the CPU core was not built, or is switched off")
    assert Path(library.get_library_path()).is_file()
    library.register(onnxruntime.SessionOptions())


def test_registers_once() -> None:
    if cpu_core() is None:
        pytest.skip("the CPU core was not built, or is switched off")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    for times in (1, 2):
        options = onnxruntime.SessionOptions()
        for _ in range(times):
            library.register(options)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    options.register_custom_ops_library(library.get_library_path())  # what would happen without
    with pytest.raises(Exception, match="Domain already set in registry"):
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    cpu_core.cache_clear()
    with pytest.raises(LobcqError, match=f"unset {SWITCH}, which is 0"):
        library.get_library_path()


def test_not_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SWITCH, str(tmp_path / "none.so"))
    cpu_core.cache_clear()
    with pytest.raises(LobcqError, match=r"cannot be loaded from .*none\.so"):
        library.get_library_path()


def test_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(installed.library, "__file__", str(tmp_path / "library.py"))
    cpu_core.cache_clear()
    with pytest.raises(LobcqError, match=r"not built: reinstall lobcq_fx with a C\+\+ compiler"):
        library.get_library_path()
