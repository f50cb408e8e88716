"""Digests: what is loaded is what was saved, of one save, from files that are files."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

import lobcq_fx
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage import checkpoint, stored_tensors
from lobcq_fx.storage.checkpoint import FILES
from lobcq_fx.storage.files import FILE_LIMIT
from lobcq_fx.storage.index import INDEX, digest_of, digests_of
from lobcq_fx.storage.shards import WEIGHTS
from tests.fuzz.flips import flip
from tests.fuzz.readers import read
from tests.fuzz.small import X, quantized


@pytest.fixture(scope="module")
def models():
    return quantized(0), quantized(1)


@pytest.fixture
def folder(models, tmp_path):
    models[0].save_pretrained(tmp_path / "q")
    return tmp_path / "q"


def test_digests_are_those_of_the_bytes(models, folder):
    index = json.loads((folder / INDEX).read_text())
    for name in ("config.json", "graph.json", "inventory.json"):
        assert index["files"][name] == digest_of((folder / name).read_bytes())
    tensors = load_file(folder / WEIGHTS)
    assert index["tensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = index["tensors"][name]
        assert (entry["dtype"], entry["shape"]) == (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        assert entry["blake3"] == digest_of(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def test_digests_of_every_kind_of_tensor():
    kinds = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "view": torch.arange(6.0).view(2, 3).t(),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
    }
    found = digests_of(kinds)
    assert list(found) == list(kinds)
    assert found["scalar"].blake3 == digest_of(kinds["scalar"].numpy().tobytes())
    assert found["view"].blake3 == digest_of(kinds["view"].contiguous().numpy().tobytes())
    assert found["empty"].blake3 == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"  # BLAKE3's own


@pytest.mark.parametrize("name", FILES)
def test_no_changed_byte_is_computed_with(models, folder, name):
    found = flip(models[0], folder, name, 60, seed=0)
    assert found["another result"] == 0
    assert found["refused"] > 50


def test_swapped_tensors_are_noticed_and_those_of_another_dtype_without_reading_them(models, folder, monkeypatch):
    monkeypatch.setattr(stored_tensors, "SMALL", 16)
    expected = models[0](X)
    tensors = load_file(folder / WEIGHTS)
    one, other = "0.weight.codes", "2.weight.codes"
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"0\.weight\.codes is .*; saved was .*, and 1 more tensors differ"):
        lobcq_fx.load(folder)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(lobcq_fx.load(folder, verify=False)(X), expected)  # which is the price
    tensors[one] = tensors[one].view(torch.int8)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"0\.weight\.codes is int8"):
        lobcq_fx.load(folder, verify=False)


@pytest.mark.parametrize("name", ["inventory.json", WEIGHTS, INDEX])  # the rest is the same for one architecture
@pytest.mark.parametrize("verify", [True, False])
def test_files_of_two_saves_are_no_model(models, folder, tmp_path, name, verify):
    models[1].save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, folder / name)
    with pytest.raises(CheckpointError, match="is not what was saved"):
        lobcq_fx.load(folder, verify=verify)


def test_a_reader_beside_a_writer_sees_one_save(tmp_path):
    found = read(tmp_path / "q", 20)
    assert found["one"] > 10
    assert found["a mixture"] == 0
    assert found["saves"] > 1


def test_a_folder_that_is_always_replaced_is_given_up(folder, monkeypatch):
    generations = iter(range(100))
    monkeypatch.setattr(checkpoint, "_generation", lambda _: (0, next(generations)))
    with pytest.raises(CheckpointError, match="was replaced 5 times while it was read"):
        lobcq_fx.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_pipes_and_devices_are_no_files(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        lobcq_fx.load(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        lobcq_fx.load(folder)


@pytest.mark.parametrize("name", [name for name in FILES if name != WEIGHTS])
def test_files_have_a_size_that_they_may_be_of(folder, name):
    with (folder / name).open("r+b") as file:
        file.truncate(FILE_LIMIT + 1)  # sparse
    with pytest.raises(CheckpointError, match=f"{name} is larger than 64 MiB"):
        lobcq_fx.load(folder)


@contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[0][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])


@pytest.mark.parametrize("limit", [512, 8192], ids=["the weights", "the graph"])
def test_a_disk_that_fills_up_is_an_os_error_and_the_old_model_stays(models, folder, limit):
    with files_of_at_most(limit), pytest.raises(OSError, match="File too large"):
        models[1].save_pretrained(folder)
    assert torch.equal(lobcq_fx.load(folder)(X), models[0](X))
    assert [path.name for path in folder.parent.iterdir()] == ["q"]


def test_a_full_disk_has_its_number(models, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: .*lobcq.safetensors") as caught:
        models[0].save_pretrained(tmp_path / "q")
    assert caught.value.errno == errno.ENOSPC


def test_an_index_of_sizes_that_are_none_is_damaged(folder):
    index = json.loads((folder / INDEX).read_text())
    index["tensors"]["0.bias"]["shape"] = [float("inf")]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is damaged: OverflowError"):
        lobcq_fx.load(folder)


def test_a_disk_without_room_is_told_before_it_is_written_to(models, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 7, 3))
    with pytest.raises(OSError, match=r"[\d,]+ bytes are needed and 3 are free"):
        models[0].save_pretrained(tmp_path / "q")
    assert not list(tmp_path.iterdir())
