"""What to say about an operator that torch.onnx cannot translate."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping

from torch import fx
from torch.export import ExportedProgram

from lobcq_fx.export.flat_module import PREFIX
from lobcq_fx.graph.matmuls import module_path

REMEDY = "or leave the module that calls it out and export those around it"


def explain(error: Exception, program: ExportedProgram) -> str:
    """Name the operator, the layer it follows, and what to do."""
    reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
    operator = re.search(r"target=torch\.ops\.([\w.]+)", reason)
    if operator is None:
        return f"the graph cannot be converted to ONNX: {reason}"
    nodes = {node.name: node for node in program.graph.nodes}
    mentioned = (nodes[name] for name in re.findall(r"%(\w+)", reason) if name in nodes)
    names = program.graph_signature.inputs_to_buffers
    layer = next((layer for node in mentioned if (layer := _nearest_layer(node, names))), None)
    where = f", which follows {layer}," if layer else ""
    return (
        f"ONNX has no operator for {operator[1]}{where} and torch.onnx cannot express it by others. Remedy: compute it"
        f" by other torch functions, {REMEDY}"
    )


def explain_complex(node: fx.Node) -> str:
    """Name what is computed in complex numbers and cannot be in real ones, and where."""
    what = {"placeholder": f"takes {node.target}", "output": "returns some of its outputs"}
    found = what.get(node.op, f"computes {node.target}")
    names = {one.name: str(one.target) for one in node.graph.find_nodes(op="get_attr")}
    layer = _nearest_layer(node, names)
    where = f" in {module_path(node)}" if module_path(node) else f", which follows {layer}," if layer else ""
    return (
        f"the model {found}{where} in complex numbers, which ONNX does not have; products, sums and views of them"
        f" are exported in real ones, this is not. Remedy: write it with real tensors, {REMEDY}"
    )


def _nearest_layer(node: fx.Node, names: Mapping[str, str]) -> str | None:
    """The module whose tensors are the first to be read on the way up from a node; `names` has them by node."""
    seen, queue = {node}, deque([node])
    while queue:
        current = queue.popleft()
        name = names.get(current.name, "").removeprefix(PREFIX)
        if name and not name.startswith("lobcq."):  # codebooks belong to no layer
            return re.sub(r"\.(weight|bias)(\.\w+)?$", "", name)
        queue.extend(set(current.all_input_nodes) - seen)
        seen.update(current.all_input_nodes)
    return None
