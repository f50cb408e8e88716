"""What stayed in bf16 or fp16 computes in fp32: ONNX Runtime's CPU kernels for narrow floats are few."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

NARROW = (torch.bfloat16, torch.float16)


def compute_in_float32(graph_module: fx.GraphModule) -> bool:
    """Widen every buffer and every cast of a graph; returns whether there was any. Packed weights stay."""
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
    graph_module.recompile()
    return modified


def _widened(argument: Any) -> Any:
    return torch.float32 if argument in NARROW else argument
