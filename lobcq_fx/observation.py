"""Run a graph over calibration data, and see what the weights of a plan are multiplied with.

All calls go through the graph together, a segment at a time. What is seen of a segment is yielded before the next one
runs, so that its weights can be encoded and go, and second moments are held of one segment's activations alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from lobcq_fx.calibration.groups import Moments, SeenRows
from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.errors import CalibrationError
from lobcq_fx.graph.aliasing import writes_inputs
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.graph.graph_module import LobcqGraphModule
from lobcq_fx.graph.segments import Segment, segments
from lobcq_fx.graph.written import kept, state_of
from lobcq_fx.passes.insert_observers import InsertObservers, Observer, observed, observers_of, seen_rows
from lobcq_fx.plan import PlannedMatmul, PlannedWeight, QuantizationPlan

SEGMENT = 2**28
"""Bytes of float weights in a segment: a few layers of a small model, half a layer of a large one."""

Values = dict[str, Any]
"""What is known in a call between two segments, by the names of the graph's nodes."""


@dataclass(frozen=True)
class Observed:
    """What was seen in a segment.

    index: of the segment. plan: its matmuls. statistics: of the activations of those that are quantized.
    rows: what second moments are made of, where they were asked for.
    """

    index: int
    plan: QuantizationPlan
    statistics: Mapping[PlannedMatmul, ActivationStatistics]
    rows: Mapping[PlannedMatmul, SeenRows]

    @classmethod
    def nothing(cls, plan: QuantizationPlan) -> Observed:
        """Of a graph that was not run."""
        return cls(0, plan, {}, {})

    def moments(
        self, statistics: Mapping[PlannedMatmul, ActivationStatistics]
    ) -> Iterator[tuple[PlannedWeight, Moments | None]]:
        """Every weight of the plan once, in execution order, with the second moments of all that it meets as encoded.

        None for weights that are not compensated. Two weights of one activation get the same tensor. To be called once:
        what second moments are made of goes as they are made, and they go with the last weight that gets them.

        Args:
            statistics: say what becomes of an activation before it is encoded.
        """
        waiting = Counter(matmul.weight for matmul in self.plan.quantized)
        readers = Counter(id(statistics[matmul]) for matmul in self.plan.quantized if matmul.compensated)
        made: dict[int, Moments] = {}
        sums: dict[PlannedWeight, Any] = {}
        for matmul in self.plan.quantized:
            weight = matmul.weight
            assert weight is not None
            if matmul.compensated:
                seen = statistics[matmul]
                if id(seen) not in made:
                    made[id(seen)] = self.rows[matmul].moments(seen.encoded_moments)
                sums[weight] = sums[weight] + made[id(seen)] if weight in sums else made[id(seen)]
                readers[id(seen)] -= 1
                if not readers[id(seen)]:
                    del made[id(seen)]
            waiting[weight] -= 1
            if not waiting[weight]:
                yield weight, sums.pop(weight, None)


class Relay(Protocol):
    """Between processes that have some of the calls each, and see the same together."""

    def receive(self, index: int, observers: Sequence[Observer]) -> None:
        """Before a segment runs: what the calls of those before have shown goes into its observers."""

    def pass_on(self, observers: Sequence[Observer], seen: Observed) -> None:
        """Afterwards: for those that come next."""


class Observation:
    """A graph that is observed segment by segment.

    It may lose its weights, and get other parameters, after this is made: what it reads is kept here until it was read.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        plan: QuantizationPlan,
        together: Iterable[Iterable[PlannedMatmul]] = (),
        limit: int | None = None,
    ) -> None:
        """
        Args:
            graph_module: what the plan was made of.
            plan: whose quantized matmuls are observed.
            together: sets of matmuls, each of which is to be in one segment; those that read one weight are.
            limit: bytes of float weights in a segment, unless what is to be together has more; None for one segment.
        """
        self._plan = plan
        self._pairs = {matmul.node: planned for matmul, planned in plan.pair(graph_module)}
        nodes = {planned: node for node, planned in self._pairs.items()}
        of_weights: dict[PlannedWeight, list[PlannedMatmul]] = {}
        for one in plan.quantized:
            if one.weight is not None:
                of_weights.setdefault(one.weight, []).append(one)
        sets = [[nodes[one] for one in some if one in nodes] for some in (*together, *of_weights.values())]
        wanted = [nodes[one] for one in plan.quantized]
        self._inputs = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
        self.segments = segments(graph_module.graph, wanted, sets, lambda name: _size(graph_module, name), limit)
        names = {name for one in self.segments for name in one.attributes}
        self._values = {name: get_attribute(graph_module, name) for name in names}

    def plan_of(self, segment: Segment) -> QuantizationPlan:
        """The matmuls that run in a segment."""
        here = tuple(planned for node, planned in self._pairs.items() if node.name in segment.names)
        return replace(self._plan, matmuls=here)

    def run(
        self,
        calls: Iterable[Sequence[Any]],
        *,
        moments: bool,
        progress: Callable[[int, int | None], None] | None = None,
        loaded: Callable[[Segment], AbstractContextManager[Any]] | None = None,
        between: Callable[[], MutableSequence[Values]] = list,
        known: Container[int] = (),
        relay: Relay | None = None,
    ) -> Iterator[Observed]:
        """Run the graph, once.

        Args:
            calls: flat inputs of the graph, one sequence for each call.
            moments: whether to gather second moments, of what compensated weights meet.
            progress: called with (calls of segments that ran, those in all).
            loaded: enters a context in which a segment's attributes are what they should be, until it was used.
            between: makes what holds the calls' values between segments.
            known: indices of segments that only run, and are not yielded.
            relay: gets what is seen, in the place of the caller, to whom nothing is yielded then; a process among
                several may have no call.

        Raises:
            CalibrationError: there is no call; or a layer saw NaN or infinity.
        """
        work = _Progress(len(self.segments), length_hint(calls, 0) or None, progress)
        values: Iterable[Values] = (dict(zip(self._inputs, inputs, strict=True)) for inputs in calls)
        held = between()
        for index, segment in enumerate(self.segments):
            plan = self.plan_of(segment)
            observed_here = index not in known
            with (loaded or _nothing_to_load)(segment):
                graph_module = self._graph_module(segment)
                if observed_here:
                    InsertObservers(plan, moments)(graph_module)
                observers = observers_of(graph_module)
                if relay is not None and observed_here:
                    relay.receive(index, observers)
                for number, found in enumerate(_after(segment, graph_module, values)):
                    if index == 0:
                        held.append(found)
                    else:
                        held[number] = found
                    work.step()
                if relay is None:
                    work.check()
                seen = Observed(index, plan, observed(graph_module, plan), seen_rows(graph_module, plan))
                del graph_module  # with the weights
                self._forget(index)
                if relay is None and observed_here:
                    yield seen
            if relay is not None and observed_here:
                relay.pass_on(observers, seen)
            values = held

    def _graph_module(self, segment: Segment) -> fx.GraphModule:
        return LobcqGraphModule({name: self._values[name] for name in segment.attributes}, segment.graph)

    def _forget(self, index: int) -> None:
        """Let go of what no segment after this one reads."""
        ahead = {name for one in self.segments[index + 1 :] for name in one.attributes}
        for name in self._values.keys() - ahead:
            del self._values[name]


def observe(
    graph_module: fx.GraphModule,
    plan: QuantizationPlan,
    calls: Iterable[Sequence[Any]],
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Insert observers into a whole graph, and run it over calls of it, flat inputs each.

    Raises:
        CalibrationError: there is no call; or a layer saw NaN or infinity.
    """
    InsertObservers(plan)(graph_module)
    work = _Progress(1, length_hint(calls, 0) or None, progress)
    names = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
    whole = Segment(graph_module.graph, tuple(names), (), (), frozenset())
    for _ in _after(whole, graph_module, (dict(zip(names, inputs, strict=True)) for inputs in calls)):
        work.step()
    work.check()


def _after(segment: Segment, graph_module: fx.GraphModule, values: Iterable[Values]) -> Iterator[Values]:
    """What is known in each call once a segment has run in it; its memory is as it was."""
    written = writes_inputs(segment.graph)
    with kept(state_of(graph_module)):
        for known in values:
            inputs = [known[name] for name in segment.inputs]
            with torch.inference_mode():
                made = graph_module(*(_copied(one) if written else one for one in inputs))
            known = known | dict(zip(segment.outputs, made, strict=False))
            yield {name: known[name] for name in segment.carried}


class _Progress:
    def __init__(self, segments: int, calls: int | None, report: Callable[[int, int | None], None] | None) -> None:
        self._done, self._report = 0, report
        self._total = None if calls is None else segments * calls

    def step(self) -> None:
        self._done += 1
        if self._report is not None:
            self._report(self._done, self._total)

    def check(self) -> None:
        if not self._done:
            raise CalibrationError("calibration_data is empty: pass at least one model input")


def _nothing_to_load(segment: Segment) -> AbstractContextManager[None]:
    return nullcontext()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _size(graph_module: fx.GraphModule, name: str) -> int:
    value = get_attribute(graph_module, name)
    return value.nbytes if isinstance(value, Tensor) else 0
