"""Libraries learn of LO-BCQ when they are imported, before or after this package, which imports them for nobody."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TEACHERS = {
    "transformers.quantizers.auto": "lobcq_fx.integrations.quantization_method",  # the table of quantizers
    "peft.tuners.lora.config": "lobcq_fx.integrations.lora",  # which layers get which adapters
}
"""Modules of other libraries, and the module of ours that enters LO-BCQ into each."""


class _Finder(MetaPathFinder):
    """Lets those modules be imported as ever, and ours right after."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in TEACHERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module(TEACHERS[name])

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Now with what is there, with the rest as soon as somebody imports it."""
    for known in TEACHERS.keys() & sys.modules.keys():
        import_module(TEACHERS[known])
    sys.meta_path.insert(0, _Finder())
