"""Parameters from a folder of floats to files of packed weights, each noted in a journal once it is on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lobcq_fx.encoding import encode_planned
from lobcq_fx.errors import CheckpointError
from lobcq_fx.float_weights import matrices_of
from lobcq_fx.modules.packed_weight import PARTS
from lobcq_fx.pipeline import Progress
from lobcq_fx.storage.index import TensorDigest, described, digested
from lobcq_fx.storage.journal import Journal
from lobcq_fx.storage.weights_file import WeightsFiles
from lobcq_fx.streaming.emission import Emission
from lobcq_fx.streaming.float_folder import FloatFolder
from lobcq_fx.streaming.skeleton import Provenance
from lobcq_fx.streaming.spare_memory import SpareMemory
from lobcq_fx.streaming.transformers_loading import load_through
from lobcq_fx.streaming.workers import Workers

LEAST_LIMIT = 2**28
"""Bytes under way, or twice those of the largest parameter, if that is more."""


@dataclass(frozen=True)
class Finished:
    """What was stored of a parameter.

    tensors: with their digests, by name. encoded: of each packed weight its bytes, and how well it is kept in dB.
    """

    tensors: Mapping[str, TensorDigest]
    encoded: Mapping[str, tuple[int, float]]

    def to_dict(self) -> dict[str, Any]:
        """For a journal."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Finished:
        """Inverse of `to_dict`."""
        tensors = {name: TensorDigest.from_dict(one) for name, one in entry["tensors"].items()}
        return cls(tensors, {name: (int(size), float(noise)) for name, (size, noise) in entry["encoded"].items()})


@dataclass(frozen=True)
class Parameters:
    """What is to be read, and what becomes of it: folder and dtype as `load_through` takes them."""

    folder: FloatFolder
    dtype: torch.dtype | str
    provenance: Provenance
    emission: Emission


def transfer(
    parameters: Parameters,
    files: WeightsFiles,
    journal: Journal,
    share: Mapping[str, Finished | None],
    progress: Progress,
) -> dict[str, Finished]:
    """Encode and write every parameter of a share that is not on the disk as a journal may have it.

    Returns:
        What was stored of each.

    Raises:
        CheckpointError: the folder cannot be read, or is not what it was.
        LobcqError: a weight holds NaN or infinity.
        OSError: the disk is full, or fails.
    """
    done = {name: one for name, one in share.items() if one is not None and _is_there(one, files)}
    if done.keys() != share.keys():
        with _Transfer(parameters, files, journal, progress, share.keys() - done.keys(), done) as under_way:
            load_through(parameters.folder, parameters.dtype, under_way.read, under_way.take)
            under_way.wait()  # in the block, which a signal ends before the files are closed
    missing = sorted(share.keys() - done.keys())
    if missing:
        raise CheckpointError(f"{parameters.folder.path} gave no {missing[0]}, and {len(missing) - 1} more parameters")
    return done


def _is_there(one: Finished, files: WeightsFiles) -> bool:
    return all(files.digest(name) == tensor.blake3 for name, tensor in one.tensors.items())


class _Transfer:
    """Reads in the caller's thread; encodes, writes and notes in others."""

    def __init__(
        self,
        parameters: Parameters,
        files: WeightsFiles,
        journal: Journal,
        progress: Progress,
        left: set[str],
        done: dict[str, Finished],
    ) -> None:
        self._folder, self._provenance = parameters.folder, parameters.provenance
        self._emission = parameters.emission
        self._files, self._journal, self._progress, self._left, self._done = files, journal, progress, left, done
        self._limit = max(LEAST_LIMIT, 2 * max(self._emission.sizes.values()))
        self._workers, self._memory = Workers(self._limit), SpareMemory()

    def __enter__(self) -> _Transfer:
        self._workers.__enter__()
        self._report()
        return self

    def __exit__(self, *error: Any) -> None:
        self._workers.__exit__(*error)
        self._report()

    def read(self, name: str) -> Tensor:
        """A stored tensor; no content where nothing of it is left to do."""
        parameters = self._provenance.parameters_of(name)
        size, whole = self._folder.size(name), sum(self._emission.sizes.get(one, 0) for one in parameters)
        if size != whole:  # what is cast, or put together of others, is there twice for as long as that takes
            self._workers.wait_for_room(max(size, whole) + whole)
        elif parameters & self._left:
            self._workers.wait_for_room(whole)
        if not parameters & self._left:
            return self._folder.without_content(name)
        made = whole if size != whole else 0  # of what is read, in memory of torch's
        under_way = max(self._workers.under_way, self._memory.given)
        return self._folder.read(name, partial(self._memory.take, most=self._limit - under_way - size - made))

    def take(self, model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pass what is left to do on."""
        for alias, tensor in parameters.items():
            name = self._provenance.aliases[alias]
            if name in self._left:
                self._left.discard(name)
                self._workers.submit(tensor.nbytes, partial(self._store, name, tensor))
        self._report()
        return {}

    def wait(self) -> None:
        """Until all that was passed on is on the disk."""
        self._workers.wait_for_all()

    def _store(self, name: str, parameter: Tensor) -> None:
        use, encoded = self._emission.uses[name], dict[str, tuple[int, float]]()
        tensors = {place: parameter.reshape(self._emission.tensors[place].shape) for place in use.kept}
        for weight, _ in use.weights:
            matrices = partial(matrices_of, parameter.reshape(weight.source_shape), weight)
            packed, noise = encode_planned(weight, matrices, self._emission.codebooks)
            encoded[weight.stored] = packed.nbytes, noise
            tensors |= {f"{weight.stored}.{part}": getattr(packed, part) for part in PARTS}
        stored = {name: tensor for name, tensor in tensors.items() if name in self._emission.tensors}
        for place, tensor in stored.items():
            if described(tensor) != self._emission.tensors[place]:
                raise CheckpointError(f"{self._folder.path} gave a {tensor.dtype} {list(tensor.shape)} for {place}")
            self._files.write(place, tensor)
        finished = Finished({place: digested(tensor) for place, tensor in stored.items()}, encoded)
        self._files.sync(stored)
        self._journal.add(name, finished.to_dict())
        self._done[name] = finished

    def _report(self) -> None:
        encoded = sum(len(self._emission.uses[name].weights) for name in tuple(self._done))
        self._progress("encode", encoded, len(self._emission.plan.weights))
