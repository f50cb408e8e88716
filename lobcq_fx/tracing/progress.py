"""How far a capture is: it runs the model's forward, so that every submodule that it calls is a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def counted_calls(model: nn.Module, report: Callable[[int, int | None], None]) -> Iterator[None]:
    """Report (calls of submodules, None) as they are made within, since nobody knows how many there will be."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        report(calls, None)

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    report(0, None)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    report(calls, calls)
