"""ONNX export: one file that stock ONNX Runtime opens, and the op library that makes it fast."""

from lobcq_fx.export.library import get_library_path, register

__all__ = ["get_library_path", "register"]
