"""A second graph over a graph module's tensors: each exists once, whichever graph reads it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from lobcq_fx.graph.attributes import delete_attribute, free_name, get_attribute, has_attribute, register_attribute
from lobcq_fx.graph.graph_module import LobcqGraphModule, ensure_code, hold

_ROOT = "_lobcq_root"
"""A name that hides no parameter or submodule of a model."""


class SharingGraphModule(LobcqGraphModule):
    """Runs a graph on the parameters, buffers and submodules of another graph module, the root.

    It has the root's own dictionaries, so that what is registered, deleted or moved in one of them is in the other. It
    is not registered in the root, whose state dict and parameters stay as they are. The graph has no code yet.
    """

    def __init__(self, root: fx.GraphModule, graph: fx.Graph) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name="LobcqGraph")
        self.__dict__[_ROOT] = root  # not by setattr, which would make it a submodule
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = getattr(root, name)
        hold(self, graph)
        self.training = root.training

    def __deepcopy__(self, memo: dict[int, Any]) -> SharingGraphModule:
        # The root's copy, which memo has if the root is being copied too: fx would copy the tensors once more.
        copied = SharingGraphModule(copy.deepcopy(self.__dict__[_ROOT], memo), copy.deepcopy(self.graph, memo))
        ensure_code(copied)
        return copied


def drop_shared(graph_module: fx.GraphModule, root: fx.GraphModule) -> None:
    """Drop the tensors that `root` has under the same name, so that they can be freed there. `share` brings them back.

    Constants that tracing made are compared by value: each trace makes its own.
    """
    tensors = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    for name, tensor in tensors:
        if has_attribute(root, name) and _same(tensor, get_attribute(root, name)):
            delete_attribute(graph_module, name)


def share(graph_module: fx.GraphModule, root: fx.GraphModule) -> SharingGraphModule:
    """The graph of `graph_module` on the tensors of `root`, which also gets those that only this graph reads.

    Args:
        graph_module: after `drop_shared`.
        root: keeps its graph.
    """
    own = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    readers = {name: graph_module.graph.find_nodes(op="get_attr", target=name) for name, _ in own}
    for name, tensor in own:
        owner, _, last = name.rpartition(".")
        target = free_name(root, owner, last) if has_attribute(root, name) else name
        register_attribute(root, target, tensor)
        for node in readers[name]:
            node.target = target
    return SharingGraphModule(root, graph_module.graph)


def _same(tensor: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    return tensor.data_ptr() == other.data_ptr() or torch.equal(tensor, other)
