"""Pass: what stayed in bf16 or fp16 computes in fp32; ONNX Runtime's CPU kernels for narrow floats are few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.node import map_aggregate

from lobcq_fx.passes.infra import GraphPass

NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ComputeInFloat32(GraphPass):
    """Widen every buffer and every cast of a graph. Packed weights stay, and so does what is fp32 already."""

    name: ClassVar[str] = "compute_in_float32"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Widen them; the graph's metadata, which told the old dtypes, then goes."""
        modified = False
        for module in graph_module.modules():
            for name, tensor in list(module.named_buffers(recurse=False)):
                if tensor.dtype in NARROW:
                    setattr(module, name, tensor.float())
                    modified = True
        for node in graph_module.graph.nodes:
            arguments = (node.args, node.kwargs)
            args, kwargs = map_aggregate(arguments, _widened)
            if (args, kwargs) != arguments:
                node.args, node.kwargs = args, kwargs
                modified = True
        if modified:
            for node in graph_module.graph.nodes:
                node.meta.pop("val", None)
        return modified


def _widened(argument: Any) -> Any:
    return torch.float32 if argument in NARROW else argument
