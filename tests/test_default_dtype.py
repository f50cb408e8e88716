"""Nothing that the package allocates follows `torch.set_default_dtype` or `torch.set_default_device`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from torch.utils._device import _device_constructors

import lobcq_fx

PACKAGE = Path(lobcq_fx.__file__).parent
CREATORS = {function.__name__ for function in _device_constructors()}
"""Of torch, as torch lists them: what makes a tensor of the default device, and most of it of the default dtype."""

UNTYPED = {"Tensor", "FloatTensor", "get_default_dtype", "get_default_device"}
"""Of torch: what depends on the defaults and cannot be told otherwise."""


def creations(source: str) -> Iterator[tuple[int, str, set[str]]]:
    """(line, function, keywords) of each call that makes a tensor from nothing but numbers."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in CREATORS | UNTYPED:
                yield node.lineno, node.func.attr, {keyword.arg or "**" for keyword in node.keywords}


def test_every_tensor_is_made_with_a_dtype_and_a_device_of_its_own() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for line, function, keywords in creations(path.read_text(encoding="utf-8")):
            if function in UNTYPED or not {"dtype", "device"} <= keywords:
                found.append(f"{file}:{line} torch.{function}")
    assert found == []


def test_the_search_sees_what_it_is_for() -> None:
    source = "a = torch.zeros(3)\nb = torch.ones((), dtype=torch.float32, device='cpu')\nc = x.new_empty(2)"
    assert [(line, function) for line, function, _ in creations(source)] == [(1, "zeros"), (2, "ones")]
    assert {"empty", "tensor", "arange", "full", "eye", "randint", "as_tensor", "linspace"} <= CREATORS
