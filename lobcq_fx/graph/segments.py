"""Cut a graph into segments that run one after the other, each on the values that the ones before it have left.

A graph of a large model runs in little memory like this: what it reads is needed a segment at a time. Segments end
where few values are alive: between the layers of a transformer it is the hidden state, and what all of them share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from torch import Tensor, fx

from lobcq_fx.graph.aliasing import written_arguments
from lobcq_fx.graph.dead_code import has_effects
from lobcq_fx.graph.operands import made_of


@dataclass(frozen=True)
class Segment:
    """A part of a graph, as a graph.

    graph: takes values of the whole graph by position, and returns a tuple of such.
    inputs, outputs: their names, those of the whole graph's nodes. carried: all that the segments after this one read.
    names: of the whole graph's nodes that run in this one.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    carried: tuple[str, ...]
    names: frozenset[str]

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of what its graph reads besides, each once."""
        return tuple(dict.fromkeys(str(node.target) for node in self.graph.find_nodes(op="get_attr")))


def segments(
    graph: fx.Graph,
    wanted: Iterable[fx.Node],
    together: Iterable[Iterable[fx.Node]],
    size_of: Callable[[str], int],
    limit: int | None,
) -> tuple[Segment, ...]:
    """Cut what computes some nodes of a graph. Nothing else of it runs, but for what changes what others see.

    Args:
        graph: with metadata. One that writes to memory stays whole: what it has written is no value of a node.
        wanted: nodes that are to run.
        together: sets of nodes, each of which is to be in one segment.
        size_of: bytes of an attribute, by its name.
        limit: bytes that the attributes of a segment are to have at most, unless what is to be together has more; None
            makes one segment.
    """
    wanted = set(wanted)
    constant = _constant(graph, wanted)
    order = [one for one in _needed(graph, wanted) if one not in constant]
    places = {node: place for place, node in enumerate(order)}
    ends = [len(order)]
    if limit is not None and not any(written_arguments(node) for node in order):
        sets = [[places[one] for one in some if one in places] for some in together]
        sizes = _sizes(order, constant, size_of)
        ends = _ends(len(order), _bytes_alive(order, places), sets, sizes, limit)
    alive = [_alive(order, places, end) for end in ends]
    starts = [0, *ends[:-1]]
    return tuple(
        _segment(order[start:end], carried, constant) for start, end, carried in zip(starts, ends, alive, strict=True)
    )


def _constant(graph: fx.Graph, wanted: set[fx.Node]) -> set[fx.Node]:
    """What is computed of attributes alone, which each segment does for itself: but for what is wanted, and of that."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        made = node.op == "call_function" and inputs and constant.issuperset(inputs)
        if node not in wanted and (node.op == "get_attr" or made):
            constant.add(node)
    return constant


def _needed(graph: fx.Graph, wanted: set[fx.Node]) -> list[fx.Node]:
    """In execution order, without what is passed in."""
    nodes = list(graph.nodes)
    last = max(place for place, node in enumerate(nodes) if node in wanted)
    needed = set(wanted)
    for node in reversed(nodes[: last + 1]):
        if node in needed or has_effects(node):
            needed.update((node, *node.all_input_nodes))
    return [one for one in nodes if one in needed and one.op != "placeholder"]


def _alive(order: Sequence[fx.Node], places: Mapping[fx.Node, int], at: int) -> list[fx.Node]:
    """What is known at a place, and read from there on."""
    read = (one for node in order[at:] for one in node.all_input_nodes)
    return [one for one in dict.fromkeys(read) if places.get(one, -1) < at and _is_value(one, places)]


def _is_value(node: fx.Node, places: Mapping[fx.Node, int]) -> bool:
    return node in places or node.op == "placeholder"


def _ends(
    count: int,
    alive: Sequence[int],
    together: Iterable[Sequence[int]],
    sizes: Sequence[Mapping[str, int]],
    limit: int,
) -> list[int]:
    """Where segments end: of the places that are far enough from the last one, where the least is alive."""
    cut = [0] * (count + 1)  # how many sets would be, at each place
    for some in together:
        if some:
            cut[min(some) + 1] += 1
            cut[max(some) + 1] -= 1
    allowed = [place for place, sets in enumerate(accumulate(cut)) if not sets and 0 < place < count]
    ends, start = list[int](), 0
    while True:
        size = _sizes_from(sizes[start:])
        ahead = [place for place in allowed if place > start and size[place - start]]
        if size[-1] <= limit or not ahead:
            return [*ends, count]
        within = [place for place in ahead if size[place - start] <= limit]
        large = [place for place in within if size[place - start] > limit // 4]
        start = min(large or within or ahead[:1], key=lambda place: (alive[place], -place))
        ends.append(start)


def _bytes_alive(order: Sequence[fx.Node], places: Mapping[fx.Node, int]) -> list[int]:
    """At each place, the bytes of what is known there and read from there on."""
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(order):
        last.update(dict.fromkeys(node.all_input_nodes, place))
    changes = [0] * (len(order) + 2)
    for node, place in last.items():
        if _is_value(node, places):
            changes[places.get(node, -1) + 1] += _bytes(node)
            changes[place + 1] -= _bytes(node)
    return list(accumulate(changes))


def _bytes(node: fx.Node) -> int:
    """Of one token in one sequence: dimensions whose size is not fixed count as 1."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    return prod(size for size in value.shape if isinstance(size, int)) * value.dtype.itemsize


def _sizes(order: Sequence[fx.Node], constant: set[fx.Node], size_of: Callable[[str], int]) -> list[dict[str, int]]:
    """Of the attributes that each node reads, at once or behind what is computed of nothing else, by name."""
    result = []
    for node in order:
        made = (one for argument in node.all_input_nodes if argument in constant for one in made_of(argument))
        names = dict.fromkeys(str(one.target) for one in made if one.op == "get_attr")
        result.append({name: size_of(name) for name in names})
    return result


def _sizes_from(sizes: Sequence[Mapping[str, int]]) -> list[int]:
    """Of the attributes that are read before each place, each counted once."""
    known: dict[str, int] = {}
    totals = [0]
    for one in sizes:
        totals.append(totals[-1] + sum(size for name, size in one.items() if name not in known))
        known.update(one)
    return totals


def _segment(nodes: Sequence[fx.Node], carried: Sequence[fx.Node], constant: set[fx.Node]) -> Segment:
    own, graph = set(nodes), fx.Graph()
    read = dict.fromkeys(
        one for node in nodes for one in node.all_input_nodes if one not in constant and one not in own
    )
    copies: dict[fx.Node, fx.Node] = {}
    for node in read:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)

    def copied(node: fx.Node) -> fx.Node:
        """In it, after what it is made of."""
        if node not in copies:
            for one in node.all_input_nodes:
                copied(one)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    for node in nodes:
        copied(node)
    left = [node for node in carried if node in own]
    graph.output(tuple(copies[node] for node in left))
    inputs, outputs, later = (tuple(node.name for node in some) for some in (read, left, carried))
    return Segment(graph, inputs, outputs, later, frozenset(node.name for node in nodes))
