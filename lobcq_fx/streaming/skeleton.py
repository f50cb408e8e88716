"""A float model without its weights: what of it is small is real, the rest are stand-ins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lobcq_fx.errors import NotStreamedError
from lobcq_fx.streaming.float_folder import FloatFolder
from lobcq_fx.streaming.stand_ins import StandIns
from lobcq_fx.streaming.transformers_loading import load_through

SMALL = 2**20
"""Bytes of a tensor that is read as it is: norms, biases, routers."""


@dataclass(frozen=True)
class Provenance:
    """Where a model's parameters, buffers included, come from.

    sources: stored tensors, by the folder's names -> the parameters that are made of them.
    aliases: every name of a parameter -> the one that it goes by here.
    """

    sources: Mapping[str, frozenset[str]]
    aliases: Mapping[str, str]

    def parameters_of(self, source: str) -> frozenset[str]:
        """The parameters that a stored tensor is a part of."""
        return frozenset(self.aliases[name] for name in self.sources.get(source, ()))


@dataclass(frozen=True)
class Skeleton:
    """A model that runs, traces and saves as the one of the folder, but computes something else.

    model: in eval mode. provenance: of its parameters.
    """

    model: PreTrainedModel
    provenance: Provenance
    _taken: frozenset[str]
    _large: frozenset[str]
    _names: Mapping[int, str]
    _real: frozenset[int]

    @classmethod
    def of(cls, folder: FloatFolder, dtype: torch.dtype | str) -> Skeleton:
        """Build it.

        Raises:
            CheckpointError: the folder's model cannot be read.
            NotStreamedError: the folder lacks a parameter, or transformers makes one in a way of its own.
        """
        loading = _Loading(folder)
        model, missing = load_through(folder, dtype, loading.read, loading.take)
        if missing:
            raise NotStreamedError(f"{folder.path} has no {missing[0]}, which transformers makes up")
        tensors = _tensors_of(model)
        first = {id(one): name for name, one in reversed(tensors.items())}
        aliases = {name: first[id(one)] for name, one in tensors.items()}
        large = {aliases[name]: tensors[name] for name in loading.large}
        stand_ins = StandIns(large)
        for name, one in large.items():
            one.data = stand_ins[name]
        _check_real(folder, {name: one for name, one in tensors.items() if aliases[name] not in large})
        taken = frozenset(aliases[name] for name in loading.taken)
        names = {tensors[name].data_ptr(): name for name in taken if tensors[name].numel()}
        real = frozenset(one.data_ptr() for name, one in tensors.items() if aliases[name] not in taken)
        return cls(model.eval(), Provenance(loading.sources, aliases), taken, frozenset(large), names, real)

    def name_of(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor is, or looks at, of those that are made of stored ones; None for others."""
        return self._names.get(tensor.data_ptr())

    def stands_in(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor stands in for; None for one that is real."""
        name = self.name_of(tensor)
        return name if name in self._large else None

    def reads(self, name: str) -> bool:
        """Whether a parameter, by any of its names, is made of stored tensors."""
        return self.provenance.aliases.get(name) in self._taken

    def size_of(self, name: str) -> int:
        """Bytes of a parameter."""
        size: int = self.model.get_parameter_or_buffer(name).nbytes
        return size

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the model's."""
        return tensor.data_ptr() in self._names or tensor.data_ptr() in self._real


def _check_real(folder: FloatFolder, tensors: Mapping[str, Tensor]) -> None:
    for name, one in tensors.items():
        if one.is_floating_point() and bool(one.isnan().any()):
            raise NotStreamedError(f"{name} of {folder.path} holds NaN, or is read in a way of its own")


class _Loading:
    """Reads what is small; of the rest no content, but shapes and dtypes."""

    def __init__(self, folder: FloatFolder) -> None:
        self._folder = folder
        self._read: list[str] = []
        self._contents: dict[str, int] = {}
        self.taken: set[str] = set()
        self.large: set[str] = set()
        self.sources: dict[str, frozenset[str]] = {}

    def read(self, name: str) -> Tensor:
        """NaN in the place of what is large: whatever is made of it is known by that."""
        self._read.append(name)
        dtype, shape = self._folder.dtype(name), self._folder.shape(name)
        if not dtype.is_floating_point or self._folder.size(name) <= SMALL:
            return self._folder.read(name)
        return torch.full((), torch.nan, dtype=dtype, device="cpu").expand(shape)

    def take(self, model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters without memory, or as they are read."""
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        taken = {}
        self.taken |= parameters.keys()
        for name, one in parameters.items():
            if one.nbytes <= SMALL and not bool(one.isnan().any()):
                taken[name] = one
                continue
            self.large.add(name)
            # transformers ties parameters that are both there only where they are equal.
            content = self._content(self._read[-1]) if name in tied else 0
            taken[name] = torch.full((), content, dtype=one.dtype, device="cpu").expand(one.shape)
        for source in self._read:
            self.sources[source] = self.sources.get(source, frozenset()) | parameters.keys()
        self._read.clear()
        return taken

    def _content(self, source: str) -> int:
        """A small number for the content of a stored tensor, the same for the same."""
        return self._contents.setdefault(self._folder.digest(source), len(self._contents))


def _tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by all their names, tied ones under each."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
