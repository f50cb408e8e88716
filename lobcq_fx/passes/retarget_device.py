"""Pass: point the devices that tracing wrote into the graph (arange, zeros, casts) at another device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lobcq_fx.passes.infra import GraphPass


@dataclass(frozen=True)
class RetargetDevice(GraphPass):
    """Replace every `torch.device` among the nodes' arguments."""

    name: ClassVar[str] = "retarget_device"

    device: torch.device

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite arguments in place."""
        modified = False
        for node in graph_module.graph.nodes:
            args, kwargs = self._retarget(node.args), self._retarget(node.kwargs)
            if (args, kwargs) != (node.args, node.kwargs):
                node.args, node.kwargs = args, kwargs
                modified = True
        return modified

    def _retarget(self, arguments: Any) -> Any:
        return fx.node.map_aggregate(arguments, lambda a: self.device if isinstance(a, torch.device) else a)
