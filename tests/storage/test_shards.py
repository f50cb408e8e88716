"""Weights in several files: split as transformers splits them, read from folders of ours, refused from others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import lobcq_fx
from lobcq_fx.errors import CheckpointError, ConfigError
from lobcq_fx.report.content import ReportContent
from lobcq_fx.storage.checkpoint import verify_folder
from lobcq_fx.storage.files import FILE_LIMIT
from lobcq_fx.storage.index import INDEX, FolderIndex, digest_of, digests_of
from lobcq_fx.storage.shards import SHARD_INDEX, WEIGHTS, Shards
from tests.fuzz.flips import flip
from tests.fuzz.small import X, quantized

SIZE = 600
"""Bytes: codes of 64 x 64 are more, and alone in a file."""


@pytest.fixture(scope="module")
def models() -> tuple[lobcq_fx.QuantizedModel, lobcq_fx.QuantizedModel]:
    return quantized(0), quantized(1)


@pytest.fixture(scope="module")
def saved(models: tuple[lobcq_fx.QuantizedModel, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in one file, and in several."""
    root = tmp_path_factory.mktemp("saved")
    models[0].save_pretrained(root / "whole")
    models[0].save_pretrained(root / "sharded", max_shard_size=SIZE)
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / "sharded", tmp_path / "q")
    return tmp_path / "q"


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("lobcq-*.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_are_those_of_transformers_and_their_bytes_those_of_safetensors(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "whole" / WEIGHTS)
    in_order = {name: tensors[name] for name in json.loads((saved / "whole" / INDEX).read_text())["tensors"]}
    expected = huggingface_hub.split_torch_state_dict_into_shards(
        in_order, filename_pattern="lobcq{suffix}.safetensors", max_shard_size=SIZE
    )
    index = json.loads((saved / "sharded" / SHARD_INDEX).read_text())
    assert index == {"metadata": expected.metadata, "weight_map": expected.tensor_to_filename}
    assert {file.name for file in shards_of(saved / "sharded")} == expected.filename_to_tensors.keys()
    for name, names in expected.filename_to_tensors.items():
        save_file({one: tensors[one] for one in names}, tmp_path / name, metadata={"format": "pt"})
        assert (tmp_path / name).read_bytes() == (saved / "sharded" / name).read_bytes()
    sizes = [sum(tensors[one].nbytes for one in names) for names in expected.filename_to_tensors.values()]
    assert max(sizes) > SIZE  # a tensor that is larger
    assert sum(size <= SIZE for size in sizes) > 2


def test_the_model_is_the_same(models: Any, saved: Path, tmp_path: Path) -> None:
    loaded = lobcq_fx.load(saved / "sharded")
    assert torch.equal(loaded(X), models[0](X))
    assert not verify_folder(saved / "sharded")[1]
    loaded.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved / "whole")
    books, others = (ReportContent.of_folder(saved / name).codebooks for name in ("whole", "sharded"))
    assert books.keys() == others.keys()
    assert all(torch.equal(books[name], others[name]) for name in books)


def test_a_save_leaves_none_of_the_files_of_the_one_before(models: Any, saved: Path, folder: Path) -> None:
    (folder / "notes-00001-of-00002.safetensors").write_text("somebody's")
    for size in (SIZE, 4000, None, SIZE):
        models[1].save_pretrained(folder, max_shard_size=size)
        fresh = folder.with_name(f"fresh {size}")
        models[1].save_pretrained(fresh, max_shard_size=size)
        found = contents(folder)
        assert found.pop("notes-00001-of-00002.safetensors") == b"somebody's"
        assert found == contents(fresh)
        assert torch.equal(lobcq_fx.load(folder)(X), models[1](X))


@pytest.mark.parametrize("size", ["a lot", "5", 0, -1, "977KiB", 1.5, []])
def test_what_is_no_size_is_refused_before_any_work(models: Any, tmp_path: Path, size: Any) -> None:
    with pytest.raises(ConfigError, match=r"max_shard_size=.* is no size: .*Remedy: a number of bytes, or a text as"):
        models[0].save_pretrained(tmp_path / "q", max_shard_size=size)
    with pytest.raises(ConfigError, match="is no size"):
        lobcq_fx.quantize_folder(tmp_path / "nothing", tmp_path / "q", max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_no_tensors_are_one_file() -> None:
    assert Shards.split({}).files == {WEIGHTS: ()}


def reindex(folder: Path) -> None:
    """Digests of what is there now, by somebody who knows how they are checked."""
    files = json.loads((folder / INDEX).read_text())["files"]
    there = {name: digest_of((folder / name).read_bytes()) for name in files if (folder / name).is_file()}
    tensors = {name: one for file in shards_of(folder) if file.is_file() for name, one in load_file(file).items()}
    FolderIndex(there, digests_of(tensors)).write(folder)


def mapped(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A folder whose index of shards was changed: the function gets its weight_map, or returns another."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / SHARD_INDEX).read_text())
        given = change(index["weight_map"])
        index["weight_map"] = index["weight_map"] if given is None else given
        (folder / SHARD_INDEX).write_text(json.dumps(index))

    return damage


def renamed(name: str) -> Callable[[Path], None]:
    """The second shard under another name, in the index and on the disk where that can be."""

    def damage(folder: Path) -> None:
        second = shards_of(folder)[1].name
        shutil.copy(folder / second, folder.parent / "outside.safetensors")
        mapped(lambda m: {tensor: name if file == second else file for tensor, file in m.items()})(folder)

    return damage


def tensor_in_two(folder: Path) -> None:
    first, second = shards_of(folder)[:2]
    tensors = load_file(second)
    save_file({**tensors, **load_file(first)}, second, metadata={"format": "pt"})


def linked(target: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shards_of(folder)[1].unlink()
        (folder / f"lobcq-00002-of-{len(shards_of(folder)) + 1:05d}.safetensors").symlink_to(target)

    return damage


def other_entry(value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["weights"] = value
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def drop_entry(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["weights"]
    (folder / "config.json").write_text(json.dumps(config))


def emptied(folder: Path) -> None:
    save_file({}, shards_of(folder)[1])


OUTSIDE = r"is in .*, which is no file of weights beside it"
CRAFTED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file above": (renamed("../outside.safetensors"), OUTSIDE),
    "an absolute path": (renamed("/dev/zero"), OUTSIDE),
    "a path that comes back": (renamed("../q/lobcq-00002-of-00007.safetensors"), OUTSIDE),
    "another file of the folder": (renamed("config.json"), OUTSIDE),
    "the file of a whole model": (renamed(WEIGHTS), OUTSIDE),
    "a name with a line": (renamed("lobcq-00002-of-00007.safetensors\n"), OUTSIDE),
    "no name": (mapped(lambda m: m.update({next(iter(m)): 7})), OUTSIDE),
    "no map": (mapped(lambda m: []), "has no weight_map"),
    "an empty map": (mapped(lambda m: {}), "has no weight_map"),
    "a shard that is not named": (
        mapped(lambda m: {tensor: file for tensor, file in m.items() if "-00002-" not in file}),
        r"names \d+ shards, and lobcq-00001-of-\d+.safetensors is not among them",
    ),
    "shards of two numbers": (
        mapped(lambda m: {tensor: file.replace("00002-of-", "00001-of-1")[:33] for tensor, file in m.items()}),
        "which is no file of weights|is not among them",
    ),
    "a shard that is not there": (lambda folder: shards_of(folder)[1].unlink(), r"00002-of-\d+.safetensors is missing"),
    "a shard too many": (
        lambda folder: shutil.copy(shards_of(folder)[0], folder / "lobcq-00001-of-00099.safetensors"),
        "00099.safetensors is not of the model that",
    ),
    "a whole model besides": (
        lambda folder: shutil.copy(shards_of(folder)[0], folder / WEIGHTS), "lobcq.safetensors is not of the model",
    ),
    "no index": (lambda folder: (folder / SHARD_INDEX).unlink(), "index.json is missing"),
    "a tensor in two shards": (tensor_in_two, r"00002-of-\d+.safetensors has .*, against"),
    "a tensor in another shard": (
        mapped(lambda m: m.update({next(iter(m)): max(m.values())})), r"(has|lacks) 0\.bias, against",
    ),
    "a shard without tensors": (emptied, r"00002-of-\d+.safetensors lacks .*, against"),
    "a link to a device": (linked("/dev/zero"), "is no regular file"),
    "a link to nothing": (linked("gone"), "is missing"),
    "a cut shard": (lambda folder: os.truncate(shards_of(folder)[1], 50), "cannot read"),
    "another entry": (other_entry("../outside.safetensors"), "has weights='../outside.safetensors', which is neither"),
    "an entry that is no text": (other_entry([WEIGHTS]), "which is neither"),
    "no entry": (drop_entry, "is not of the model that|is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", CRAFTED)
@pytest.mark.parametrize("digests", ["as they were", "that fit"])
def test_folders_that_were_made_to_deceive_are_refused(folder: Path, case: str, digests: str) -> None:
    damage, message = CRAFTED[case]
    before = contents(folder)
    damage(folder)
    assert os.path.lexists(folder / SHARD_INDEX) != (case == "no index")
    if digests == "that fit":
        if case != "a cut shard":
            reindex(folder)
        with pytest.raises(CheckpointError, match=message):
            lobcq_fx.load(folder)
    else:
        assert before != {path.name: path.is_file() and path.stat().st_size for path in folder.iterdir()}
        for verify in (True, False):
            with pytest.raises(CheckpointError, match=f"{message}|is not what was saved"):
                lobcq_fx.load(folder, verify=verify)
        assert verify_folder(folder)[1]


def test_links_to_files_are_files(models: Any, folder: Path, tmp_path: Path) -> None:
    """As a hub's cache has them."""
    (tmp_path / "blobs").mkdir()
    for path in tuple(folder.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert torch.equal(lobcq_fx.load(folder)(X), models[0](X))


def test_an_index_has_a_size_that_it_may_be_of(folder: Path) -> None:
    with (folder / SHARD_INDEX).open("r+b") as file:
        file.truncate(FILE_LIMIT + 1)  # sparse
    with pytest.raises(CheckpointError, match=f"{SHARD_INDEX} is larger than 64 MiB"):
        lobcq_fx.load(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_shards_of_two_saves_are_no_model(models: Any, folder: Path, tmp_path: Path, verify: bool) -> None:
    models[1].save_pretrained(tmp_path / "other", max_shard_size=SIZE)
    for shard in shards_of(tmp_path / "other"):
        shutil.copy(shard, folder / shard.name)
    with pytest.raises(CheckpointError, match=r"lobcq.safetensors.index.json is not what was saved"):
        lobcq_fx.load(folder, verify=verify)


def test_no_changed_byte_is_computed_with(models: Any, folder: Path) -> None:
    for name in (SHARD_INDEX, shards_of(folder)[0].name):
        found = flip(models[0], folder, name, 30, seed=0)
        assert found["another result"] == 0
        assert found["refused"] > 20
