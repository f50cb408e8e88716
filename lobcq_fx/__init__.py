"""LO-BCQ (W4A4, 4.5 bits a scalar) for PyTorch models: trace, calibrate, rewrite, save and run.

q = lobcq_fx.quantize(model)
q.save_pretrained("quantized")
q = lobcq_fx.load("quantized")

`from_pretrained` of transformers, imported before or after, opens such folders too, as models of its own classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lobcq_fx.integrations.on_import import register

if TYPE_CHECKING:
    from lobcq_fx.config import LobcqConfig
    from lobcq_fx.default_model import default_model_path
    from lobcq_fx.errors import LobcqError
    from lobcq_fx.export import export_onnx
    from lobcq_fx.format import FormatSpec
    from lobcq_fx.frontends.lobcq_cache import LobcqCache
    from lobcq_fx.integrations.quantization_method import LobcqQuantizationConfig
    from lobcq_fx.loading import load
    from lobcq_fx.model import QuantizedModel
    from lobcq_fx.optimizing import optimize
    from lobcq_fx.pipeline import quantize
    from lobcq_fx.streaming.quantize_folder import quantize_folder

__version__ = "0.1.0"

__all__ = [
    "FormatSpec",
    "LobcqCache",
    "LobcqConfig",
    "LobcqError",
    "LobcqQuantizationConfig",
    "QuantizedModel",
    "default_model_path",
    "export_onnx",
    "load",
    "optimize",
    "quantize",
    "quantize_folder",
]

_HOMES = {
    "FormatSpec": "lobcq_fx.format",
    "LobcqCache": "lobcq_fx.frontends.lobcq_cache",
    "LobcqConfig": "lobcq_fx.config",
    "LobcqError": "lobcq_fx.errors",
    "LobcqQuantizationConfig": "lobcq_fx.integrations.quantization_method",
    "QuantizedModel": "lobcq_fx.model",
    "default_model_path": "lobcq_fx.default_model",
    "export_onnx": "lobcq_fx.export",
    "load": "lobcq_fx.loading",
    "optimize": "lobcq_fx.optimizing",
    "quantize": "lobcq_fx.pipeline",
    "quantize_folder": "lobcq_fx.streaming.quantize_folder",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562): the command line answers before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
