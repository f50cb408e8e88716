"""QuantizationPlan: what becomes of every matmul of a model, decided once and used for every graph of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from lobcq_fx import selection
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import TraceError
from lobcq_fx.format import FormatSpec
from lobcq_fx.graph.attributes import free_name, has_attribute
from lobcq_fx.graph.matmuls import Matmul, find_matmuls, module_path
from lobcq_fx.graph.multiply_adds import example_sizes, multiply_adds
from lobcq_fx.graph.operands import operation_name, readers
from lobcq_fx.graph.stored_linear import LINEARS


@dataclass(frozen=True)
class PlannedWeight:
    """A weight to encode. One attribute is several where it is read both ways, or in two formats.

    source: name of the float attribute. flipped: that is [K, N], the weight its transpose; or [E, K, N].
    shape: (N, K), or of a stack of experts' weights (E, N, K).
    stored: name that the packed weight gets: the float one's where it takes its place.
    keeps_float: something else goes on reading the float attribute.
    """

    source: str
    flipped: bool
    spec: FormatSpec
    shape: tuple[int, ...]
    stored: str
    keeps_float: bool

    @property
    def columns(self) -> int:
        """K."""
        return self.shape[-1]

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Of the float attribute."""
        return (*self.shape[:-2], *reversed(self.shape[-2:])) if self.flipped else self.shape

    @property
    def stacked(self) -> bool:
        """Whether it is a stack [E, N, K], whose matrices are encoded each for itself."""
        return len(self.shape) == 3


@dataclass(frozen=True, eq=False)
class PlannedMatmul:
    """One matmul, in execution order, and what is to become of it. Two are never equal: a layer may be called twice.

    layer: module path of its weight's owner. path: of the module that runs it.
    operation: what it was in the traced graph. shape: of the constant operand, None without one.
    config: the settings for this layer, overrides applied.
    weight: what it is to read; None where it stays in float.
    refusal: why it stays in float; None where it does not. asked: the settings name it, by a pattern.
    float_bytes: of the constants that no earlier matmul reads. multiply_adds: with them, in the traced example.
    grouped: it multiplies groups of rows with the matrices of a stack.
    static_scale: name that its activation's static scale gets, None without one.
    input_scale: name of what its activation is multiplied with, where that turns out to be needed; the same for all
        that read one activation. None where the settings have no place for it.
    """

    layer: str
    path: str
    operation: str
    shape: tuple[int, ...] | None
    config: LobcqConfig
    weight: PlannedWeight | None
    refusal: str | None
    asked: bool
    float_bytes: int
    multiply_adds: int | None
    grouped: bool
    static_scale: str | None
    input_scale: str | None

    @property
    def compensated(self) -> bool:
        """Whether its weight is to be encoded with second moments of what it meets."""
        return self.weight is not None and self.config.rounding == "compensated"


@dataclass(frozen=True)
class QuantizationPlan:
    """Every matmul of a model's graphs, which run the same ones in the same order.

    optional: paths of modules whose matmuls a graph may leave out, all of them.
    """

    matmuls: tuple[PlannedMatmul, ...]
    optional: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        graph_module: fx.GraphModule,
        config: LobcqConfig,
        roles: Mapping[str, str] | None = None,
        optional: frozenset[str] = frozenset(),
    ) -> QuantizationPlan:
        """Decide for each matmul of a graph after `NormalizeMatmuls`.

        Args:
            graph_module: the graph.
            config: what to quantize and how.
            roles: module path -> what that layer is to the model, for patterns such as `@head`.
            optional: see the class.
        """
        matmuls = find_matmuls(graph_module)
        choices = [_choose(matmul, config, (roles or {}).get(matmul.layer)) for matmul in matmuls]
        taken = [(matmul, choice) for matmul, choice in zip(matmuls, choices, strict=True) if choice.refusal is None]
        names = _Names(graph_module)
        weights = _weights(taken, names)
        counted = _Counted(graph_module.graph)
        return cls(
            tuple(
                _planned(matmul, choice, weights, names, counted)
                for matmul, choice in zip(matmuls, choices, strict=True)
            ),
            optional,
        )

    @property
    def quantized(self) -> tuple[PlannedMatmul, ...]:
        """The matmuls that are not left in float."""
        return tuple(matmul for matmul in self.matmuls if matmul.weight is not None)

    @property
    def weights(self) -> tuple[PlannedWeight, ...]:
        """Each weight to encode once, in execution order."""
        return tuple(dict.fromkeys(matmul.weight for matmul in self.quantized if matmul.weight is not None))

    @property
    def times_read(self) -> Mapping[PlannedWeight, int]:
        """By how many matmuls each weight is read."""
        return Counter(matmul.weight for matmul in self.quantized if matmul.weight is not None)

    @property
    def compensates(self) -> bool:
        """Whether any weight is to be encoded with second moments of what it meets."""
        return any(matmul.compensated for matmul in self.quantized)

    @property
    def formats(self) -> tuple[FormatSpec, ...]:
        """The formats that weights or activations are encoded in, by name."""
        used = {spec for one in self.quantized for spec in (one.config.format, one.config.activations)}
        return tuple(sorted(used, key=lambda spec: spec.name))

    def pair(self, graph_module: fx.GraphModule) -> list[tuple[Matmul, PlannedMatmul]]:
        """The matmuls of a graph that are not emitted yet, each with its plan.

        Args:
            graph_module: it runs the plan's matmuls, or all but those of `optional` modules.

        Raises:
            TraceError: it does not; says where they differ.
        """
        matmuls = {matmul.node: matmul for matmul in find_matmuls(graph_module)}
        nodes = [node for node in graph_module.graph.nodes if node in matmuls or node.target in LINEARS]
        followed = self.matmuls
        if len(nodes) != len(followed):
            followed = tuple(one for one in followed if one.path not in self.optional)
        if len(nodes) != len(followed):
            raise TraceError(f"it has {len(nodes)} matmuls, the graph that it follows {len(followed)}")
        for node, planned in zip(nodes, followed, strict=True):
            if module_path(node) != planned.path:
                raise TraceError(
                    f"it runs a matmul in {module_path(node)!r} where the graph that it follows runs one in"
                    f" {planned.path!r}"
                )
        pairs = [(matmuls[n], planned) for n, planned in zip(nodes, followed, strict=True) if n in matmuls]
        _check_weights(pairs)
        return pairs


@dataclass(frozen=True)
class _Choice:
    config: LobcqConfig
    refusal: str | None
    asked: bool

    @property
    def static(self) -> bool:
        return self.config.activation_scale == "static" and self.config.mode != "w4a16"

    @property
    def smoothed_everywhere(self) -> bool:
        """Whether its activation may be multiplied by a scale for each column."""
        return self.config.smoothing == "everywhere"


# What a weight is encoded for: its attribute, whether it is transposed, and the format.
_Key = tuple[str, bool, str]


def _choose(matmul: Matmul, config: LobcqConfig, role: str | None) -> _Choice:
    settings = config.for_layer(matmul.layer, role)
    asked = settings.refusal(matmul.layer, role) is not None
    if matmul.obstacle is not None:
        return _Choice(settings, matmul.obstacle, asked)
    assert matmul.weight is not None
    assert matmul.shape is not None
    dtype = matmul.weight.meta["val"].dtype
    return _Choice(settings, selection.refusal(matmul.layer, matmul.shape, dtype, settings, role), asked)


def _key(matmul: Matmul, choice: _Choice) -> _Key:
    assert matmul.weight is not None
    return str(matmul.weight.target), matmul.flipped, choice.config.format.name


def _weights(taken: list[tuple[Matmul, _Choice]], names: _Names) -> dict[_Key, PlannedWeight]:
    """The weights to encode, in execution order. The last of an attribute takes its place, if nobody else reads it."""
    groups: dict[_Key, tuple[Matmul, _Choice]] = {}
    reading: dict[str, set[fx.Node]] = {}
    last: dict[str, _Key] = {}
    for matmul, choice in taken:
        key = _key(matmul, choice)
        groups.setdefault(key, (matmul, choice))
        reading.setdefault(key[0], set()).add(matmul.node)
    for key in groups:
        last[key[0]] = key
    planned = {}
    for key, (matmul, choice) in groups.items():
        source = key[0]
        assert matmul.weight is not None
        assert matmul.shape is not None
        replaces = last[source] == key and readers(matmul.weight) <= reading[source]
        stored = source if replaces else names.beside(matmul.layer)
        planned[key] = PlannedWeight(
            source, matmul.flipped, choice.config.format, matmul.shape, stored, keeps_float=not replaces
        )
    return planned


def _planned(
    matmul: Matmul, choice: _Choice, weights: Mapping[_Key, PlannedWeight], names: _Names, counted: _Counted
) -> PlannedMatmul:
    quantized = choice.refusal is None
    return PlannedMatmul(
        layer=matmul.layer,
        path=module_path(matmul.node),
        operation=operation_name(matmul.node),
        shape=matmul.shape,
        config=choice.config,
        weight=weights[_key(matmul, choice)] if quantized else None,
        refusal=choice.refusal,
        asked=choice.asked,
        float_bytes=counted.new_bytes(matmul),
        multiply_adds=counted.multiply_adds(matmul),
        grouped=matmul.grouped,
        static_scale=names.new(matmul.layer, "activation_scale") if quantized and choice.static else None,
        input_scale=names.of_input(matmul) if quantized and choice.smoothed_everywhere else None,
    )


class _Counted:
    """Bytes and multiply-adds of a graph's matmuls, in order; a constant's bytes count once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._sizes = example_sizes(graph)
        self._seen: set[fx.Node] = set()

    def new_bytes(self, matmul: Matmul) -> int:
        new = [one.meta["val"] for one in matmul.constants if one not in self._seen]
        self._seen.update(matmul.constants)
        return sum(value.numel() * value.element_size() for value in new)

    def multiply_adds(self, matmul: Matmul) -> int | None:
        return 0 if matmul.weight is None else multiply_adds(matmul.node, matmul.weight, self._sizes)


class _Names:
    """Attribute names for what the plan adds to a graph module: free there, and each given away once."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._given: set[str] = set()
        self._inputs: dict[fx.Node, str] = {}

    def of_input(self, matmul: Matmul) -> str:
        """For the scale of an activation: one name, whoever reads it."""
        if matmul.activation not in self._inputs:
            self._inputs[matmul.activation] = self.new(matmul.layer, "input_scale")
        return self._inputs[matmul.activation]

    def new(self, layer: str, last: str) -> str:
        name = free_name(self._graph_module, layer, last, self._given)
        self._given.add(name)
        return name

    def beside(self, layer: str) -> str:
        """For a packed weight whose float one stays."""
        taken = has_attribute(self._graph_module, f"{layer}.weight") or f"{layer}.weight" in self._given
        return self.new(layer, "weight_packed" if taken else "weight")


def _check_weights(pairs: list[tuple[Matmul, PlannedMatmul]]) -> None:
    """A graph reads one float weight where the plan has one, of the same shape; nothing else reads those that go."""
    attributes: dict[str, str] = {}
    reading: dict[str, set[fx.Node]] = {}
    for matmul, planned in pairs:
        if planned.weight is None:
            continue
        target = None if matmul.weight is None else str(matmul.weight.target)
        known = attributes.setdefault(planned.weight.source, str(target))
        same = (matmul.flipped, matmul.shape) == (planned.weight.flipped, planned.weight.shape)
        if target is None or known != target or not same:
            raise TraceError(
                f"its matmul in {matmul.layer} reads {target}, that of the graph it follows {planned.weight.source}"
            )
        reading.setdefault(target, set()).add(matmul.node)
    if len(set(attributes.values())) != len(attributes):
        raise TraceError("two of its weights are one in the graph that it follows")
    for matmul, planned in pairs:
        if planned.weight is not None and matmul.weight is not None and not planned.weight.keeps_float:
            others = readers(matmul.weight) - reading[str(matmul.weight.target)]
            if others:
                raise TraceError(f"it reads {matmul.weight.target} in float too, in {next(iter(others)).format_node()}")
