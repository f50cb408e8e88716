"""Calibrate a model of stand-ins on data: its weights are read, encoded and let go of a segment at a time.

Each segment's results are a file of their own, noted in the journal. Work that goes on runs the segments that are done
once more, for what the next ones see, and encodes nothing twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, fx

from lobcq_fx.encoding import EncodedWeight, encode_planned, records_of, register_static_scales
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.graph.segments import Segment
from lobcq_fx.inventory import MatmulRecord
from lobcq_fx.modules.packed_weight import PARTS
from lobcq_fx.observation import SEGMENT, Observation, Observed
from lobcq_fx.pipeline import Progress
from lobcq_fx.plan import PlannedMatmul, PlannedWeight
from lobcq_fx.preparation import Preparation
from lobcq_fx.storage.atomic_folder import flush
from lobcq_fx.storage.index import TensorDigest, bytes_of, described, digest_of, digest_of_pieces, digested
from lobcq_fx.storage.journal import Journal, entries_of_all
from lobcq_fx.storage.weights_file import size_of, weights_file
from lobcq_fx.streaming.emission import Made, Outline
from lobcq_fx.streaming.float_folder import FloatFolder
from lobcq_fx.streaming.handover import Handover, own_calls
from lobcq_fx.streaming.parameters import read_parameters
from lobcq_fx.streaming.ranks import Ranks
from lobcq_fx.streaming.skeleton import SMALL
from lobcq_fx.streaming.spilled import SpilledValues

JOURNAL = "journal-segments"
PIECES, VALUES, HANDED = "segments", "values", "handed"
"""Folders beside the journals: of what is made of each segment, of what calls hold between two, and of what a rank has
seen and another goes on with."""


@dataclass(frozen=True)
class Piece:
    """What was made of a segment.

    tensors: with their digests, by the names that they get in the folder. records: of its matmuls, by place in the
    plan. rotated: places of those whose operands are.
    """

    tensors: Mapping[str, TensorDigest]
    records: Mapping[int, MatmulRecord]
    rotated: Sequence[int]

    def to_dict(self) -> dict[str, Any]:
        """For a journal."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Piece:
        """Inverse of `to_dict`."""
        tensors = {name: TensorDigest.from_dict(one) for name, one in entry["tensors"].items()}
        records = {int(place): MatmulRecord.from_dict(record) for place, record in entry["records"].items()}
        return cls(tensors, records, entry["rotated"])


@dataclass(frozen=True)
class Calibrated:
    """All that calibration has made, in files.

    made: as emitting wants it. records: of the matmuls that were observed. pieces: by the file that holds each.
    """

    made: Made
    records: Mapping[PlannedMatmul, MatmulRecord]
    pieces: Mapping[Path, Piece]

    def tensors(self) -> Iterator[tuple[str, Tensor, TensorDigest]]:
        """Each with its name and digest, one in memory at a time."""
        for path, piece in self.pieces.items():
            with safe_open(path, framework="pt") as file:
                for name, digest in piece.tensors.items():
                    yield name, file.get_tensor(name), digest


class Calibration:
    """The work on one folder."""

    def __init__(self, source: FloatFolder, dtype: str, outline: Outline, place: Path, max_memory: int | None) -> None:
        """
        Args:
            source: the float model's folder. dtype: as `from_pretrained` takes it.
            outline: of its skeleton, whose graphs get real parameters in the place of small ones.
            place: the folder that outlives the process.
            max_memory: bytes: half for the float weights of a segment, half for what calls hold between segments, of
                which the rest is put on the disk. None for segments of `SEGMENT` bytes, and all else in memory.
        """
        self._source, self._dtype, self._outline, self._place = source, dtype, outline, place
        self._half = None if max_memory is None else max_memory // 2
        self._places = {one: place for place, one in enumerate(outline.plan.matmuls)}
        self._preparation = Preparation(outline.plan, outline.graph_modules)
        self._encoded = 0

    def run(
        self, calls: Sequence[Sequence[Any]], ranks: Ranks, work: Mapping[str, Any], progress: Progress
    ) -> Calibrated:
        """Do what no journal has, together with the other ranks; what is made does not depend on how many there are.

        Args:
            calls: flat inputs of the main graph, all of them in every rank.
            ranks: which are all to call this.
            work: what a journal has to be of. Each rank's gets an entry for each segment that it encodes.
            progress: called as the work goes on.

        Raises:
            CalibrationError: a layer saw NaN or infinity, or no data.
            CheckpointError: the folder cannot be read, or is not what it was.
            RankError: another rank has failed.
            LobcqError: a weight holds NaN or infinity.
            OSError: the disk is full, or fails.
        """
        observation = self._preparation.observation(SEGMENT if self._half is None else self._half)
        count = len(observation.segments)
        with closing(Journal(self._place / f"{JOURNAL}-{ranks.rank}", work)) as journal:
            begun = ranks.shared(lambda: self._begin(work, count))
            pieces = {int(index): Piece.from_dict(entry) for index, entry in begun.items()}
            own: dict[int, Piece] = {}

            def encode(part: Observed) -> None:
                own[part.index] = self._piece(part, progress)
                journal.add(_name(part.index), own[part.index].to_dict())

            if len(pieces) < count:
                self._encoded = sum(len(self._weights(piece)) for piece in pieces.values()) if ranks.first else 0
                self._run(observation, calls, ranks, pieces.keys(), encode, progress)
        gathered = ranks.gathered({index: piece.to_dict() for index, piece in own.items()})
        for entries in ranks.shared(lambda: gathered):
            pieces |= {int(index): Piece.from_dict(entry) for index, entry in entries.items()}
        return self._calibrated(dict(sorted(pieces.items())))

    def _run(
        self,
        observation: Observation,
        calls: Sequence[Sequence[Any]],
        ranks: Ranks,
        known: Container[int],
        encode: Callable[[Observed], None],
        progress: Progress,
    ) -> None:
        between: Callable[[], Any] = list
        if self._half is not None:
            between = partial(SpilledValues, self._place / f"{VALUES}-{ranks.rank}", self._half)
        loaded = partial(self._loaded, observation)

        def load_and_encode(part: Observed) -> None:
            with loaded(observation.segments[part.index]):
                encode(part)

        relay = Handover(ranks, self._place / HANDED, load_and_encode) if ranks.count > 1 else None
        parts = observation.run(
            own_calls(calls, ranks),
            moments=True,
            progress=partial(progress, "calibrate"),
            loaded=loaded,
            between=between,
            known=known,
            relay=relay,
        )
        for part in parts:
            encode(part)
        if relay is not None:
            relay.encode(wait=True)

    def _calibrated(self, pieces: Mapping[int, Piece]) -> Calibrated:
        matmuls = self._outline.plan.matmuls
        found: dict[str, TensorDigest] = {}
        small: dict[str, Tensor] = {}
        for index, piece in pieces.items():
            found |= piece.tensors
            small |= self._small(index, piece)
        rotated = frozenset(matmuls[place] for piece in pieces.values() for place in piece.rotated)
        records = {matmuls[place]: one for piece in pieces.values() for place, one in piece.records.items()}
        return Calibrated(
            Made(found, small, rotated), records, {self._file(index): one for index, one in pieces.items()}
        )

    def _begin(self, work: Mapping[str, Any], segments: int) -> dict[int, dict[str, Any]]:
        """What the journals of however many ranks have, as far as files are what they say; nothing is handed on yet."""
        (self._place / PIECES).mkdir(exist_ok=True)
        shutil.rmtree(self._place / HANDED, ignore_errors=True)
        (self._place / HANDED).mkdir()
        entries = entries_of_all(self._place.glob(f"{JOURNAL}-*"), work)
        return {
            index: entries[_name(index)]
            for index in range(segments)
            if _name(index) in entries and _is_there(self._file(index), Piece.from_dict(entries[_name(index)]))
        }

    def _piece(self, part: Observed, progress: Progress) -> Piece:
        """Decide on a segment, encode its weights, and store what comes of that."""
        root, plan = self._outline.root, self._outline.plan
        before = _tensors_of(root)
        prepared = self._preparation(part.statistics)
        register_static_scales(part.plan, root, prepared.statistics)
        tensors = {name: one for name, one in _tensors_of(root).items() if before.get(name) is not one}
        encoded: dict[PlannedWeight, EncodedWeight] = {}
        for weight, moments in part.moments(prepared.statistics):
            matrices = partial(prepared.weights.matrices, weight)
            packed, noise = encode_planned(weight, matrices, self._outline.codebooks, moments)
            tensors |= {f"{weight.stored}.{name}": getattr(packed, name) for name in PARTS}
            let_go = 0 if weight.keeps_float else get_attribute(root, weight.source).nbytes
            encoded[weight] = EncodedWeight(let_go, packed.nbytes, noise)
            self._encoded += 1
            progress("encode", self._encoded, len(plan.weights))
        arguments = encoded, self._outline.codebooks, prepared.statistics, prepared.smoothed, prepared.rotated
        records = zip(part.plan.matmuls, records_of(part.plan, *arguments), strict=True)
        own = {name: one.detach().contiguous() for name, one in tensors.items()}
        _store(self._file(part.index), own)
        return Piece(
            {name: digested(one) for name, one in own.items()},
            {self._places[one]: record for one, record in records},
            sorted(self._places[one] for one in plan.quantized if one in prepared.rotated),
        )

    @contextmanager
    def _loaded(self, observation: Observation, segment: Segment) -> Iterator[None]:
        """Within, what a segment reads, and what smoothing may change in it, is real."""
        names = {*segment.attributes, *self._preparation.parameters_of(observation.plan_of(segment))}
        skeleton, root = self._outline.skeleton, self._outline.root
        tensors = {name: get_attribute(root, name) for name in names}
        wanted = {
            name: parameter
            for name, one in tensors.items()
            if isinstance(one, Tensor) and (parameter := skeleton.stands_in(one)) is not None
        }
        found = read_parameters(self._source, self._dtype, skeleton.provenance, set(wanted.values()))
        stand_ins = {name: tensors[name].data for name in wanted}
        try:
            for name, parameter in wanted.items():
                tensors[name].data = found[parameter].reshape(tensors[name].shape)
            del found
            yield
        finally:
            for name, one in stand_ins.items():
                tensors[name].data = one

    def _small(self, index: int, piece: Piece) -> dict[str, Tensor]:
        packed = {f"{weight.stored}.{name}" for weight in self._weights(piece) for name in PARTS}
        wanted = [name for name, one in piece.tensors.items() if name not in packed and size_of(one) <= SMALL]
        with safe_open(self._file(index), framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}

    def _weights(self, piece: Piece) -> set[PlannedWeight]:
        matmuls = self._outline.plan.matmuls
        return {weight for place in piece.records if (weight := matmuls[place].weight) is not None}

    def _file(self, index: int) -> Path:
        return self._place / PIECES / f"{index}.safetensors"


def digest_of_calls(calls: Sequence[Sequence[Any]]) -> str:
    """BLAKE3 of flat inputs."""
    return digest_of("".join(_digest(one) for inputs in calls for one in inputs).encode())


def _digest(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype}{list(value.shape)}{digest_of_pieces([bytes_of(value.cpu().contiguous())])}"


def _name(index: int) -> str:
    return f"segment {index}"


def _store(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with weights_file(path, {name: described(one) for name, one in tensors.items()}) as file:
        for name, one in tensors.items():
            file.write(name, one)
        file.sync()
    flush(path.parent)


def _is_there(path: Path, piece: Piece) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return all(digested(file.get_tensor(name)) == one for name, one in piece.tensors.items())
    except (OSError, SafetensorError):
        return False


def _tensors_of(root: fx.GraphModule) -> dict[str, Tensor]:
    return {**dict(root.named_parameters(remove_duplicate=False)), **dict(root.named_buffers(remove_duplicate=False))}
