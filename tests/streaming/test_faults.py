"""quantize_folder on a full disk or of a damaged folder: what is wrong is named, and what was done is gone on with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.atomic_folder import unfinished
from lobcq_fx.storage.journal import Journal
from lobcq_fx.streaming import quantize_folder, skeleton
from lobcq_fx.streaming.emission import Outline, emit
from tests.families import ONE_LAYER
from tests.fuzz.streaming import contents, traced_once
from tests.streaming.float_models import save_float_model

SHARD = "model-00003-of-00007.safetensors"


@dataclass(frozen=True)
class Work:
    """A folder of a float model, in several files, and what becomes of it when nothing fails."""

    way: str
    source: Path
    expected: dict[str, bytes]

    def quantize(self, target: Path, **more: Any) -> None:
        """With calibration data, values between segments are put on the disk."""
        if self.way == "calibrated":
            ids = torch.randint(3, 60, (2, 2, 12), generator=torch.Generator().manual_seed(1))
            more["calibration_data"] = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
            more |= {"config": LobcqConfig.of_recipe("best"), "max_memory": 1000}
        lobcq_fx.quantize_folder(self.source, target, static_cache=False, **more)


@pytest.fixture(scope="module", params=["data-free", "calibrated"])
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    """Traced once; all tensors but norms and biases are stand-ins, as those of real sizes are."""
    root, way = tmp_path_factory.mktemp("work"), request.param
    save_float_model(transformers.LlamaConfig(**ONE_LAYER), root / "float", max_shard_size="40KB")
    with traced_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(skeleton, "SMALL", 1024)
        patch.setattr(quantize_folder, "emit", emit)  # of graphs of its own, each time
        outline_of = Outline.of
        patch.setattr(Outline, "of", lambda *arguments, **keywords: copied(outline_of(*arguments, **keywords)))
        Work(way, root / "float", {}).quantize(root / "q")
        yield Work(way, root / "float", contents(root / "q"))


def copied(outline: Outline) -> Outline:
    """With the same tensors in graphs that may be changed."""
    tensors = [one for module in outline.graph_modules.values() for one in (*module.parameters(), *module.buffers())]
    graph_modules = deepcopy(dict(outline.graph_modules), {id(one): one for one in tensors})
    return replace(outline, graph_modules=graph_modules)


@contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """Within, the system lets no file grow larger, as a full disk does; what libraries make of that is theirs."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def restored(path: Path) -> Iterator[None]:
    """After it, a file is what it was, with its time."""
    content, found = path.read_bytes(), path.stat()
    try:
        yield
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def full(size: int) -> Callable[[Work, Path], None]:
    """A fault: the call on a disk that is full beyond files of a size."""

    def fault(work: Work, target: Path) -> None:
        with full_beyond(size):
            work.quantize(target)

    return fault


def cut_while_read(work: Work, target: Path) -> None:
    """A shard loses its end when the first weight is about to be read."""

    def cut(step: str, *_: Any) -> None:
        if step in ("calibrate", "encode"):
            os.truncate(work.source / SHARD, 1000)

    with restored(work.source / SHARD):
        work.quantize(target, progress=cut)


def changed_between(work: Work, target: Path) -> None:
    """A tensor of a shard gets another value after a call that was stopped with two weights done."""

    class _StoppedError(Exception):
        pass

    def stop(step: str, done: int, total: int | None) -> None:
        if step == "encode" and done >= 2:
            raise _StoppedError

    with suppress(_StoppedError):
        work.quantize(target, progress=stop)
    assert unfinished(target).exists()
    with restored(work.source / SHARD):
        tensors = load_file(work.source / SHARD)
        next(iter(tensors.values()))[0, 0] += 1
        save_file(tensors, work.source / SHARD, metadata={"format": "pt"})
        work.quantize(target)


def tensor_gone(work: Work, target: Path) -> None:
    """A shard has not the tensor that the index has in it."""
    with restored(work.source / SHARD):
        tensors = load_file(work.source / SHARD)
        tensors.pop(next(iter(tensors)))
        save_file(tensors, work.source / SHARD, metadata={"format": "pt"})
        work.quantize(target)


def link_to_nothing(work: Work, target: Path) -> None:
    """A shard is a link into a cache that was cleared."""
    place = (work.source / SHARD).rename(work.source / "elsewhere")
    (work.source / SHARD).symlink_to("cleared")
    try:
        work.quantize(target)
    finally:
        (work.source / SHARD).unlink()
        place.rename(work.source / SHARD)


FAULTS: dict[str, tuple[Callable[[Work, Path], None], type[Exception], str]] = {
    "no room for the weights": (full(60_000), OSError, r"File too large: '.*/model/lobcq.safetensors'"),
    "a shard is cut while it is read": (
        cut_while_read, CheckpointError, rf"cannot read model\.\S+ of \S+{SHARD}: .* Remedy: copy or download",
    ),
    "a tensor changed between calls": (
        changed_between, CheckpointError, rf"was begun with other {SHARD}, and stays .* Remedy: call again as",
    ),
    "a tensor is gone": (tensor_gone, CheckpointError, rf"{SHARD} lacks model\.\S+, .* copy or download both again"),
    "a shard is a link to nothing": (link_to_nothing, CheckpointError, rf"{SHARD} is missing: .* Remedy: get it again"),
    "no room for values": (full(3000), OSError, r"File too large: '.*/values-0/0.pt'"),
    "no room for a segment": (full(30_000), OSError, r"File too large: '.*/segments/5.safetensors'"),
}  # fmt: skip
OF_CALIBRATION = ("no room for values", "no room for a segment")


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of files' sizes")
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_named_and_after_its_repair_the_folder_is_as_without_it(
    work: Work, tmp_path: Path, name: str
) -> None:
    if work.way == "data-free" and name in OF_CALIBRATION:
        pytest.skip("there are none")
    fault, error, message = FAULTS[name]
    with pytest.raises(error, match=message):
        fault(work, tmp_path / "q")
    assert {one.name for one in tmp_path.iterdir()} <= {unfinished(tmp_path / "q").name}
    work.quantize(tmp_path / "q")
    assert contents(tmp_path / "q") == work.expected
    assert [one.name for one in tmp_path.iterdir()] == ["q"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of files' sizes")
def test_a_journal_that_the_disk_has_no_room_for_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", {"settings": 1})
    with full_beyond(150), pytest.raises(OSError, match=r"File too large: '.*/journal'"):
        journal.add("a", {"value": "b" * 100})
    journal.add("a", {"value": 2})
    journal.close()
    assert Journal(tmp_path / "journal", {"settings": 1}).entries == {"a": {"name": "a", "value": 2}}
