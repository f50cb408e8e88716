"""What to say about an operator that torch.onnx cannot translate."""

from __future__ import annotations

import re
from collections import deque

from torch import fx
from torch.export import ExportedProgram

from lobcq_fx.export.stored_module import PREFIX


def explain(error: Exception, program: ExportedProgram) -> str:
    """Name the operator, the layer it follows, and what to do."""
    reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
    operator = re.search(r"target=torch\.ops\.([\w.]+)", reason)
    if operator is None:
        return f"the graph cannot be converted to ONNX: {reason}"
    nodes = {node.name: node for node in program.graph.nodes}
    mentioned = (nodes[name] for name in re.findall(r"%(\w+)", reason) if name in nodes)
    layer = next((layer for node in mentioned if (layer := _nearest_layer(node, program))), None)
    where = f", which follows {layer}," if layer else ""
    return (
        f"ONNX has no operator for {operator[1]}{where} and torch.onnx cannot express it by others. Remedy: compute it"
        " by other torch functions, or leave the module that calls it out and export those around it"
    )


def _nearest_layer(node: fx.Node, program: ExportedProgram) -> str | None:
    """The module whose tensors are the first to be read on the way up from a node."""
    names = program.graph_signature.inputs_to_buffers
    seen, queue = {node}, deque([node])
    while queue:
        current = queue.popleft()
        name = names.get(current.name, "").removeprefix(PREFIX)
        if name and not name.startswith("lobcq."):  # codebooks belong to no layer
            return re.sub(r"\.(weight|bias)(\.\w+)?$", "", name)
        queue.extend(set(current.all_input_nodes) - seen)
        seen.update(current.all_input_nodes)
    return None
