"""Small modules, their traced graphs, and what tests ask of a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.config import LobcqConfig
from lobcq_fx.encoding import encode_weights, records_of, register_static_scales
from lobcq_fx.float_weights import FloatWeights
from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, encode_int8, universal_codebooks
from lobcq_fx.inventory import MatmulRecord
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.passes.emit import Emit
from lobcq_fx.passes.infra import GraphPass, PassResult, Sequential
from lobcq_fx.passes.insert_observers import InsertObservers, observed
from lobcq_fx.passes.merge_siblings import MergeSiblings
from lobcq_fx.passes.normalize_matmuls import NormalizeMatmuls
from lobcq_fx.passes.prepack import Prepack
from lobcq_fx.passes.share_activations import ShareActivations
from lobcq_fx.plan import QuantizationPlan
from lobcq_fx.tracing.trace import trace_module

aten = torch.ops.aten
lobcq = torch.ops.lobcq


class Function(nn.Module):
    """A forward given as a function of the module and its input, over the parameters and modules given by name."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(values(*shape, seed=seed))


def values(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(n: int, k: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias)


def graph_of(model: nn.Module, *args: Any) -> fx.GraphModule:
    return trace_module(model.eval(), args or (values(2, 3, 64),)).graph_module


def normalized(model: nn.Module, *args: Any) -> fx.GraphModule:
    return NormalizeMatmuls()(graph_of(model, *args)).graph_module


def rewritten(
    graph_module: fx.GraphModule,
    config: LobcqConfig | None = None,
    codebooks: CodebookSets | None = None,
    rotated: Collection[str] = (),
) -> tuple[PassResult, tuple[MatmulRecord, ...]]:
    """Plan, encode and emit one graph, with universal codebooks unless others are given.

    rotated: layers whose activations are rotated; their weights are not, so that products are others.
    """
    plan = QuantizationPlan.of(graph_module, config or LobcqConfig())
    codebooks = codebooks or CodebookSets.universal(set(plan.formats) or {FormatSpec()})
    statistics = observed(graph_module, plan)
    encoded = encode_weights(plan, FloatWeights(graph_module), codebooks) if plan.weights else {}
    register_static_scales(plan, graph_module, statistics)
    emit = Emit(plan, codebooks, frozenset(one for one in plan.quantized if one.layer in rotated))
    return emit(graph_module), records_of(plan, encoded, codebooks, statistics)


def observe(graph_module: fx.GraphModule, config: LobcqConfig | None = None) -> PassResult:
    """Insert observers where the settings quantize."""
    return InsertObservers(QuantizationPlan.of(graph_module, config or LobcqConfig()))(graph_module)


def quantized(
    function: Callable[..., Any],
    config: LobcqConfig | None = None,
    data: Any = None,
    dtype: torch.dtype = torch.float32,
    rotated: Collection[str] = (),
    **members: Any,
) -> fx.GraphModule:
    """A function's graph after everything that `quantize` does; `data` is what observers see."""
    graph_module = normalized(Function(function, **members).to(dtype), values(2, 3, 64).to(dtype))
    if data is not None:
        observe(graph_module, config)
        run(graph_module, data)
    rewritten(graph_module, config, rotated=rotated)
    ShareActivations()(graph_module)
    EliminateDeadCode()(graph_module)
    return graph_module


def prepacked_graph(function: Callable[..., Any], **options: Any) -> fx.GraphModule:
    """The same, with weights in the layout of the CPU's kernels, and siblings in one call."""
    layout = weight_layout(torch.device("cpu"))
    assert layout is not None
    return Sequential((Prepack(layout), MergeSiblings()))(quantized(function, **options)).graph_module


def targets(graph_module: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def nodes(graph_module: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.target is target]


def names(graph_module: fx.GraphModule) -> set[str]:
    return set(graph_module.state_dict())


def run(graph_module: fx.GraphModule, *inputs: Tensor) -> Any:
    with torch.no_grad():
        outputs = graph_module(*inputs)
    return outputs[0] if len(outputs) == 1 else outputs


def assert_unchanged(one: GraphPass, graph_module: fx.GraphModule) -> PassResult:
    """The pass does not fire: it says so, and the generated code stays what it was."""
    before = graph_module.code
    result = one(graph_module)
    assert not result.modified
    graph_module.recompile()
    assert graph_module.code == before
    return result


def decoded(weight: Tensor, spec: FormatSpec | None = None) -> Tensor:
    spec = spec or FormatSpec()
    return decode(encode(weight.detach(), spec, universal_codebooks(spec.num_codebooks), search_scales=True))


def fake_quantized(
    x: Tensor, spec: FormatSpec | None = None, scale: Tensor | None = None, mode: str = "w4a4"
) -> Tensor:
    """x through the format and back, with a scale for each token unless a static one is given."""
    spec = spec or FormatSpec()
    rows = x.reshape(-1, x.shape[-1])
    if mode == "w4a8":
        return decode(encode_int8(rows, spec.array_size, scale)).view(x.shape)
    scale = absmax_row_scale(rows) if scale is None else scale
    return decode(encode(rows, spec, universal_codebooks(spec.num_codebooks), scale)).view(x.shape)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    spec: FormatSpec | None = None,
    mode: str = "w4a4",
) -> Tensor:
    """A linear layer in LO-BCQ by plain torch on the format."""
    a = x if mode == "w4a16" else fake_quantized(x, spec, mode=mode)
    return nn.functional.linear(a, decoded(weight, spec), bias)


def assert_metadata(graph_module: fx.GraphModule, *inputs: Tensor) -> None:
    """Every node's metadata says what running the graph on `inputs` gives: dtype and shape, symbolic sizes too."""
    sizes: dict[sympy.Symbol, int] = {}

    class Check(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            with torch.no_grad():
                actual = super().run_node(node)
            if isinstance(actual, Tensor):
                described = node.meta["val"]
                if node.op == "placeholder":
                    sizes.update(
                        {s.node.expr: n for s, n in zip(described.shape, actual.shape, strict=True) if is_symbol(s)}
                    )
                expected = [int(s.node.expr.subs(sizes)) if hasattr(s, "node") else s for s in described.shape]
                assert list(actual.shape) == expected, node.format_node()
                assert actual.dtype == described.dtype, node.format_node()
            return actual

    Check(graph_module).run(*inputs)


def is_symbol(size: Any) -> bool:
    return hasattr(size, "node") and isinstance(size.node.expr, sympy.Symbol)
