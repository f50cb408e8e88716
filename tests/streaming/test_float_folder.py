"""Tensors of a folder, read as safetensors itself reads them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.index import bytes_of, digest_of
from lobcq_fx.streaming import float_folder
from lobcq_fx.streaming.float_folder import SINGLE, FloatFolder

TENSORS = {
    "a": torch.randn(5, 7),
    "b": torch.randn(3, 11).bfloat16(),
    "c": torch.randn(2, 3, 4).half(),
    "a.scalar": torch.tensor(1.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
    "odd": torch.arange(5, dtype=torch.uint8),
    "small": torch.randn(9).to(torch.float8_e4m3fn),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("piece", [3, 2**24])
def test_every_tensor_is_that_of_the_library(path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(float_folder, "PIECE", piece)
    folder, expected = FloatFolder(path), load_file(path / SINGLE)
    assert {*folder} == {*TENSORS}
    for name, one in expected.items():
        found = folder.read(name)
        assert (found.dtype, found.shape) == (one.dtype, one.shape)
        assert bytes(bytes_of(found)) == bytes(bytes_of(one))
        assert folder.digest(name) == digest_of(bytes_of(one))


def test_it_is_read_into_the_memory_that_is_given(path: Path) -> None:
    given = torch.full((1000,), 255, dtype=torch.uint8)
    found = FloatFolder(path).read("a", lambda size: given[:size])
    assert found.data_ptr() == given.data_ptr()
    assert torch.equal(found, TENSORS["a"])
    assert bool((given[found.nbytes :] == 255).all())


def test_a_file_that_ends_early_is_named(path: Path) -> None:
    folder = FloatFolder(path)
    os.truncate(path / SINGLE, (path / SINGLE).stat().st_size - 1)
    *whole, last = folder
    for name in whole:
        folder.read(name)
    with pytest.raises(
        CheckpointError, match=rf"cannot read {last} of .*: it ends before the tensor does. Remedy: copy"
    ):
        folder.read(last)
    (path / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"cannot read a of .*No such file"):
        folder.read("a")
