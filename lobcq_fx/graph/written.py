"""State: memory that a call of a model, or of its graph, writes to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from lobcq_fx.graph.aliasing import written_attributes
from lobcq_fx.graph.attributes import get_attribute, register_attribute


def own_written_tensors(graph_module: fx.GraphModule) -> None:
    """Give the graph module memory of its own for what its graph writes to.

    Tensors that look at the same memory, whichever of them is written to, look at the same copy.
    """
    written = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in state_of(graph_module)}
    copies = {address: storage.clone() for address, storage in written.items()}
    named = [
        *graph_module.named_parameters(remove_duplicate=False),
        *graph_module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        copy = copies.get(tensor.untyped_storage().data_ptr())
        if copy is not None:
            register_attribute(graph_module, name, _looking_at(copy, tensor))


def state_of(graph_module: fx.GraphModule) -> list[Tensor]:
    """What a graph writes to besides its inputs."""
    return [get_attribute(graph_module, name) for name in written_attributes(graph_module.graph)]


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Tensors that a call writes to have their old values afterwards."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                if not torch.equal(tensor, old):
                    tensor.copy_(old)


_DICTIONARIES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
"""Of every module: buffers, parameters, submodules, and hooks, which transformers adds once outputs are asked for."""


@contextmanager
def module_kept(model: nn.Module, parameters: Collection[str] = ()) -> Iterator[None]:
    """A model that is called or traced is afterwards as it was: attributes, mode, buffers, and the parameters named."""
    modules = list(model.modules())
    attributes = [vars(module) for module in modules]
    attributes += [vars(module)[name] for module in modules for name in _DICTIONARIES if name in vars(module)]
    before = [dict(of) for of in attributes]
    tensors = [*model.buffers(), *(value for module in modules for value in vars(module).values() if _is_real(value))]
    tensors += [parameter for name, parameter in model.named_parameters() if name in parameters]
    try:
        with kept(tensors):
            yield
    finally:
        for of, old in zip(attributes, before, strict=True):
            of.clear()
            of.update(old)


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta"


def _looking_at(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    view = torch.empty(0, dtype=like.dtype, device=like.device)
    view.set_(storage, like.storage_offset(), like.size(), like.stride())
    return nn.Parameter(view, requires_grad=False) if isinstance(like, nn.Parameter) else view
