"""optimize(): a model that `from_pretrained` opened in LO-BCQ becomes graphs, which the passes fuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lobcq_fx.calibration.codebook_sets import MODULE
from lobcq_fx.config import LobcqConfig
from lobcq_fx.encoding import left_alone
from lobcq_fx.errors import ConfigError
from lobcq_fx.frontends import front_end_of
from lobcq_fx.frontends.tried import Tried
from lobcq_fx.graph.attributes import (
    delete_attribute,
    free_name,
    get_attr_node,
    get_attribute,
    has_attribute,
    register_attribute,
)
from lobcq_fx.graph.matmuls import find_matmuls
from lobcq_fx.graph.multiply_adds import elements, example_sizes
from lobcq_fx.graph.shared_tensors import drop_shared, share
from lobcq_fx.graph.stored_linear import stored_linears
from lobcq_fx.inventory import Inventory, MatmulRecord
from lobcq_fx.kernels.bind import bind_cpu_core
from lobcq_fx.model import QuantizedModel
from lobcq_fx.modules.packed_product import CONSTANTS, PackedProduct
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.passes.order import NORMALIZE
from lobcq_fx.passes.share_activations import ShareActivations
from lobcq_fx.plan import QuantizationPlan
from lobcq_fx.storage.validate import restore_packed_weights
from lobcq_fx.tracing.autocast import no_autocast
from lobcq_fx.tracing.trace import MAIN

IN_FLOAT = "it is in float in the model that was optimized"


@no_autocast()
def optimize(model: nn.Module, example_inputs: Any = None, *, static_cache: bool = True) -> QuantizedModel:
    """Trace a model of packed linears and experts into graphs: faster, to be exported and saved as `quantize`'s are.

    Args:
        model: what `from_pretrained` gave, of a quantized folder or with a `LobcqQuantizationConfig`. It goes on
            working; what stays in float is shared with it, packed weights are held twice until it is let go.
        example_inputs: as `quantize` takes it.
        static_cache: as `quantize` takes it.

    Returns:
        A module that gives the model's results, with `generate()` where that had it.

    Raises:
        ConfigError: the model has no packed linears.
        TraceError: it cannot be captured as one graph (names the module and the source line).
    """
    products = {name: one for name, one in model.named_modules() if isinstance(one, PackedProduct)}
    if not products:
        raise ConfigError(
            f"{type(model).__name__} has no packed linears. Remedy: lobcq_fx.quantize(model), or"
            " from_pretrained(folder, quantization_config=lobcq_fx.LobcqQuantizationConfig())"
        )
    bind_cpu_core()
    front_end, config = front_end_of(model), _config_of(model)
    for one in products.values():
        one.unpack()  # graphs are stored on weights as they are stored
    try:
        traced = front_end.trace(model, example_inputs, static_cache=static_cache)
        tried = Tried.of(front_end, model, example_inputs, traced)
        graphs = _on_one_root(tried.graphs_without(tried.unlike), products)
        inventory = _inventory(graphs[MAIN], model, config, front_end.roles(model), products)
        return tried.build(tried.parts(graphs, tried.unlike, config, inventory))
    finally:
        for one in products.values():
            one.prepack()


def _config_of(model: nn.Module) -> LobcqConfig:
    """The settings that the model was opened with."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    config = getattr(settings, "lobcq_config", None)
    return config if isinstance(config, LobcqConfig) else LobcqConfig()


def _on_one_root(
    graph_modules: Mapping[str, fx.GraphModule], products: Mapping[str, PackedProduct]
) -> dict[str, fx.GraphModule]:
    """Traced graphs as `quantize` stores them: packed weights in modules, codebooks once, tensors in the main one."""
    root = graph_modules[MAIN]
    for graph_module in graph_modules.values():
        NORMALIZE(graph_module)
        if graph_module is not root:
            drop_shared(graph_module, root)
    graphs = {name: root if one is root else share(one, root) for name, one in graph_modules.items()}
    for old, new in _moves(root, products).items():
        if not has_attribute(root, new):
            register_attribute(root, new, get_attribute(root, old))
        for one in graphs.values():
            for node in one.graph.find_nodes(op="get_attr", target=old):
                node.replace_all_uses_with(get_attr_node(one, new))
                one.graph.erase_node(node)
        delete_attribute(root, old)
    restore_packed_weights(root, [one.graph for one in graphs.values()])
    for one in graphs.values():
        ShareActivations()(one)
    EliminateDeadCode(tuple(one for one in graphs.values() if one is not root))(root)
    return graphs


def _moves(root: fx.GraphModule, products: Mapping[str, PackedProduct]) -> dict[str, str]:
    """Constants that get another name: one for each set of codebooks; and those of stacks, which become modules."""
    moves: dict[str, str] = {}
    sets: dict[str, torch.Tensor] = {}
    for layer, product in products.items():
        for constant in CONSTANTS:
            name = f"{layer}.{constant}"
            if not has_attribute(root, name):
                continue
            value = get_attribute(root, name)
            if constant.endswith("codebooks"):
                known = next((one for one, other in sets.items() if torch.equal(other, value)), None)
                moves[name] = known or f"{MODULE}.codebooks" + (f"_{len(sets)}" if sets else "")
                sets[moves[name]] = value
            elif product.packed.stack:
                owner, _, last = layer.rpartition(".")
                moves[name] = free_name(root, owner, f"{last}_{constant}")
    return moves


def _inventory(
    graph_module: fx.GraphModule,
    model: nn.Module,
    config: LobcqConfig,
    roles: Mapping[str, str],
    products: Mapping[str, PackedProduct],
) -> Inventory:
    """Every matmul in execution order; one that the settings would quantize says that it came in float."""
    plan = QuantizationPlan.of(graph_module, config, roles)
    in_float = {matmul.node: one for matmul, one in zip(find_matmuls(graph_module), plan.matmuls, strict=True)}
    packed = {one.node: one for one in stored_linears(graph_module.graph)}
    sizes, width = example_sizes(graph_module.graph), torch.finfo(_dtype(model)).bits // 8
    by_weight = {_weight_name(layer, one): (layer, one) for layer, one in products.items()}
    records: list[MatmulRecord] = []
    counted: set[str] = set()
    for node in graph_module.graph.nodes:
        if node in in_float:
            planned = in_float[node]
            records.append(left_alone(replace(planned, refusal=planned.refusal or IN_FLOAT)))
        elif node in packed:
            name = packed[node].weight
            layer, product = by_weight[name]
            record = _record(layer, product, get_attribute(graph_module, name), elements(node, sizes))
            first = name not in counted
            counted.add(name)
            float_bytes = record.scalars * width if first else 0
            records.append(replace(record, float_bytes=float_bytes, packed_bytes=first * record.packed_bytes))
    parameters = list(model.parameters())
    kept = sum(one.nbytes for one in parameters)
    replaced = [record for record in records if record.packed_bytes and record.quantized]
    return Inventory(
        tuple(records),
        sum(one.numel() for one in parameters) + sum(record.scalars for record in replaced),
        kept + sum(record.float_bytes for record in replaced),
        kept + sum(record.packed_bytes for record in replaced),
    )


def _record(layer: str, product: PackedProduct, weight: PackedWeight, results: int | None) -> MatmulRecord:
    """results: scalars that the product gives in the traced example, None where that depends on values."""
    settings = product.settings
    return MatmulRecord(
        layer,
        "grouped_mm" if weight.stack else "linear",
        (*weight.stack, weight.rows, product.in_features),
        format=settings.spec.name,
        mode=settings.mode,
        packed_bytes=sum(getattr(weight, part).nbytes for part in PARTS),
        multiply_adds=None if results is None else results * product.in_features,
        activation_format=None if settings.activations == settings.spec else settings.activations.name,
        smoothing="multiplied" if settings.input_scale else None,
        rotated=settings.rotated,
    )


def _weight_name(layer: str, product: PackedProduct) -> str:
    return layer if product.packed.stack else f"{layer}.weight"


def _dtype(model: nn.Module) -> torch.dtype:
    """Of what stayed in float."""
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
