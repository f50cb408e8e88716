"""How the inputs and outputs of a call are nested, with a JSON round trip that takes a closed list of types."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

from torch.utils import _pytree as pytree

from lobcq_fx.errors import CheckpointError, TraceError

_SEQUENCES = ("builtins.tuple", "builtins.list", "torch.fx.immutable_collections.immutable_list")
_MAPPINGS = ("builtins.dict", "collections.OrderedDict", "torch.fx.immutable_collections.immutable_dict")
_NAMED_TUPLE = "collections.namedtuple"

_DEEPEST = 64
"""Levels of a structure: those of models have three or four."""

_MOST = 100_000
"""Parts of a structure."""

_DAMAGE = (AssertionError, AttributeError, KeyError, NotImplementedError, RecursionError, TypeError, ValueError)


class Structure:
    """A pytree structure with a JSON round trip."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self.spec = spec

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        return self  # never changed, and pytree warns when its own types are copied

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Put leaves back into the structure."""
        return pytree.tree_unflatten(leaves, self.spec)

    def to_json(self) -> str:
        """The structure as JSON text.

        Raises:
            TraceError: it holds a type that cannot be written down, or that `from_json` would not take.
        """
        try:
            text = pytree.treespec_dumps(self.spec)
            for part in _parts(text):
                _check(part)
        except (NotImplementedError, TypeError, ValueError) as error:
            message = f"the model's inputs or outputs cannot be saved: {error}. Remedy: return tuples, lists or dicts"
            raise TraceError(message) from None
        return text

    @classmethod
    def from_json(cls, text: str) -> Structure:
        """Inverse of `to_json`. Nothing is imported: output classes have to be known already.

        Raises:
            CheckpointError: the text is damaged, or names a type outside the closed list.
        """
        try:
            for part in _parts(text):
                _check(part)
            structure = cls(pytree.treespec_loads(text))
            structure.unflatten(range(structure.spec.num_leaves))
        except _DAMAGE as error:
            raise CheckpointError(f"cannot read the model's call structure: {error}") from None
        return structure


def type_names(text: str) -> list[str]:
    """The types that a structure's JSON text names.

    Raises:
        ValueError: it is no such text.
    """
    return list(dict.fromkeys(part["type"] for part in _parts(text) if part["type"] is not None))


def _parts(text: str) -> Iterator[dict[str, Any]]:
    """Every level of a structure, the outermost first, each with the fields that pytree reads.

    Raises:
        ValueError: it is no such text.
    """
    try:
        protocol, outermost = json.loads(text)
    except (RecursionError, TypeError) as error:
        raise ValueError(str(error)) from None
    if protocol != 1:
        raise ValueError(f"its protocol is {protocol!r}, not 1")
    levels, count = [(outermost, 1)], 0
    while levels:
        part, depth = levels.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST:
            raise ValueError(f"it has more than {_DEEPEST} levels, or more than {_MOST} parts")
        match part:
            case {"type": str() | None, "context": _, "children_spec": list(children)} if len(part) == 3:
                yield part
                levels.extend((child, depth + 1) for child in reversed(children))
            case _:
                raise ValueError(f"{str(part)[:200]} is no part of a structure")


def _check(part: dict[str, Any]) -> None:
    """Refuse all but the closed list of types, and contexts that pytree would import something for."""
    kind, context, children = part["type"], part["context"], part["children_spec"]
    if kind is None:
        if context is not None or children:
            raise ValueError("a leaf holds something")
    elif kind in _SEQUENCES:
        if context != "null":
            raise ValueError(f"{kind} has the context {context!r}")
    elif kind == _NAMED_TUPLE:
        named = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(context) if isinstance(context, str) else None
        if named is None or not pytree.is_namedtuple_class(named):
            raise ValueError(f"it holds a named tuple {context!r}, which is not registered here")
    elif kind in _MAPPINGS or _is_output_class(kind):
        _check_keys(kind, context, len(children))
    else:
        raise ValueError(f"it holds a {kind}, which is not allowed")


def _is_output_class(kind: str) -> bool:
    """Whether a type that this process has registered is one of transformers' kind: a dataclass that is a dict."""
    found = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(kind)
    return isinstance(found, type) and is_dataclass(found) and issubclass(found, OrderedDict)


def _check_keys(kind: str, context: Any, count: int) -> None:
    """Keys are plain values: of an object, such as its notation for enums, pytree would import what it names."""
    keys: Any = json.loads(context) if isinstance(context, str) else None
    plain = isinstance(keys, list) and all(isinstance(key, (str, int, float, bool)) or key is None for key in keys)
    if not plain or len(keys) != count or len(set(keys)) != count:
        raise ValueError(f"{kind} of {count} has the keys {str(context)[:200]}, which is not allowed")
