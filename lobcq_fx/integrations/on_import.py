"""transformers learns of LO-BCQ when it is imported, before or after this package, which imports it for nobody."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
"""The module that has transformers' table of quantizers."""

QUANTIZER = "lobcq_fx.integrations.quantization_method"
"""The module that enters ours into it."""


class _RegistryFinder(MetaPathFinder):
    """Lets the registry be imported as ever, and our quantizer right after it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module(QUANTIZER)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Now if transformers is there, else as soon as somebody imports it."""
    if REGISTRY in sys.modules:
        import_module(QUANTIZER)
    else:
        sys.meta_path.insert(0, _RegistryFinder())
