"""Call structures: a closed list of types comes back from a file, and nothing is imported for it."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict, deque, namedtuple

import pytest
import torch
from torch.utils import _pytree as pytree

from lobcq_fx.errors import CheckpointError, TraceError
from lobcq_fx.tracing.structure import Structure, type_names

LEAF = {"type": None, "context": None, "children_spec": []}

Pair = namedtuple("Pair", "left right")
pytree._register_namedtuple(Pair, serialized_type_name="tests.tracing.Pair")


def text_of(kind, context, *children, protocol=1):
    return json.dumps([protocol, {"type": kind, "context": context, "children_spec": list(children)}])


@pytest.mark.parametrize(
    "value",
    [0, (0, [1, ()]), {"a": (1, [2]), 3: None}, OrderedDict(b=1, a=2), Pair(1, {"x": 2})],
    ids=lambda value: type(value).__name__,
)
def test_round_trip(value):
    text = Structure(pytree.tree_structure(value)).to_json()
    restored = Structure.from_json(text)
    assert restored.to_json() == text
    leaves = pytree.tree_leaves(value)
    assert repr(restored.unflatten(leaves)) == repr(value)


class Own(tuple):
    __slots__ = ()


class Registered(tuple):
    __slots__ = ()


pytree.register_pytree_node(Own, lambda o: (list(o), None), lambda items, _: Own(items))
pytree.register_pytree_node(
    Registered, lambda o: (list(o), None), lambda items, _: Registered(items), serialized_type_name="tests.Registered"
)


@pytest.mark.parametrize(
    "value",
    [Own([1]), Registered([1]), defaultdict(int, a=1), deque([1]), torch.Size([1]), {(1, 2): 3}],
    ids=lambda value: type(value).__name__,
)
def test_types_that_cannot_be_written_down_are_refused_when_saving(value):
    structure = Structure(pytree.tree_structure((value,)))
    with pytest.raises(TraceError, match=r"cannot be saved.*Remedy: return tuples, lists or dicts"):
        structure.to_json()


GOOD = Structure(pytree.tree_structure({"a": (1, [2])})).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "null",
        None,
        "[" * 100_000,
        GOOD.replace("builtins.dict", "os.system"),
        GOOD[:-5],
        GOOD.replace("1", "7", 1),
        GOOD.replace('\\"a\\"', ""),
        GOOD.replace('\\"a\\"', "[]"),
        GOOD.replace('"null"', "null"),
        text_of(None, None, LEAF),
        text_of("builtins.dict", '["a", "a"]', LEAF, LEAF),
        text_of("builtins.dict", '"a"', LEAF),
        text_of("builtins.tuple", "null", "leaf"),
        text_of("collections.namedtuple", "builtins.tuple", LEAF),
        text_of("collections.namedtuple", "tests.tracing.Pair", LEAF),
        text_of("collections.namedtuple", ["tests.tracing.Pair"], LEAF),
        text_of("NO_SERIALIZED_TYPE_NAME_FOUND", "null", LEAF),
        text_of("tests.Registered", "null", LEAF),
        text_of("collections.deque", "1", LEAF),
    ],
)
def test_damaged_structures(text):
    with pytest.raises(CheckpointError, match="cannot read the model's call structure"):
        Structure.from_json(text)


def test_nesting_is_bounded():
    part = LEAF
    for _ in range(80):
        part = {"type": "builtins.list", "context": "null", "children_spec": [part]}
    with pytest.raises(CheckpointError, match="more than 64 levels"):
        Structure.from_json(json.dumps([1, part]))


ENUM = json.dumps([{"__enum__": True, "fqn": "planted:Kind", "name": "A"}])
DEFAULT = {"default_factory_module": "planted", "default_factory_name": "A", "dict_context": ["a"]}
IMPORTING = {
    "enum": text_of("builtins.dict", ENUM, LEAF),
    "escaped enum": text_of("builtins.dict", ENUM, LEAF).replace("__enum__", "\\\\u005f_enum__"),
    "enum of a tuple": text_of("builtins.tuple", ENUM, LEAF),
    "enum of an OrderedDict": text_of("collections.OrderedDict", ENUM, LEAF),
    "enum of a deque": text_of("collections.deque", ENUM, LEAF),
    "defaultdict": text_of("collections.defaultdict", DEFAULT, LEAF),
    "defaultdict within": text_of("builtins.list", "null", json.loads(text_of("collections.defaultdict", DEFAULT))[1]),
}


@pytest.mark.parametrize("case", IMPORTING)
def test_a_structure_never_imports_what_the_file_names(case, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match=r"has the (keys|context)|a collections.de.*, which is not allowed"):
        Structure.from_json(IMPORTING[case])


def test_type_names_are_read_whatever_the_spacing():
    text = text_of("builtins.list", "null", json.loads(text_of("a.B", "null", LEAF))[1])
    assert type_names(text.replace(" ", "\n")) == ["builtins.list", "a.B"]
    with pytest.raises(ValueError, match="protocol"):
        type_names(text_of("builtins.list", "null", protocol=2))
