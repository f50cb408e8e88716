"""Triton's interpreter, without what it repeats for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_the_language_once_a_launch() -> None:
    """Leave it out for the functions that a kernel calls.

    The interpreter puts its own functions in the place of triton.language's when a kernel is launched, and back after
    it. It does so for every function that the kernel calls as well, which finds them in place: a third of the time.
    """
    patch: Callable[[Any], Any] = interpreter._patch_lang
    in_place: set[str] = set()

    def patch_what_is_not_in_place(function: Any) -> Any:
        seen = {name for name, value in function.__globals__.items() if value is tl or value is tl.core}
        wanted = {function.__globals__[name].__name__ for name in seen}
        if wanted <= in_place:
            return None  # which the caller, itself called by a kernel, ignores
        launched = not in_place
        in_place.update(wanted)
        scope = patch(function)
        if launched:
            restore = scope.restore
            scope.restore = lambda: (in_place.clear(), restore())
        return scope

    interpreter._patch_lang = patch_what_is_not_in_place
