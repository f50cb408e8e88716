"""Weights that are written in any order: the file that safetensors writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lobcq_fx.storage.index import described, digests_of
from lobcq_fx.storage.weights_file import DTYPES, check_room, weights_file


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Of every dtype and of several ranks, empty ones and names with quotes and accents among them."""
    torch.manual_seed(0)
    found = {
        f'a.{dtype}."é{n}': torch.randint(0, 2, (3, n)).to(getattr(torch, dtype)) for n in (5, 0) for dtype in DTYPES
    }
    return found | {"scalar": torch.tensor(1.5), "turned": torch.randn(4, 3).t().contiguous()}


def test_any_order_gives_the_bytes_of_safetensors(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    digests = digests_of(tensors)
    names = sorted(tensors)
    Random(0).shuffle(names)
    for some in (names[:9], names[9:]):  # the second time it is there already
        with weights_file(tmp_path / "found", digests) as file:
            for name in some:
                file.write(name, tensors[name])
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    with weights_file(tmp_path / "found", digests) as file:
        assert {name: file.digest(name) for name in tensors} == {name: one.blake3 for name, one in digests.items()}


def test_a_file_takes_the_tensors_that_it_was_made_for(tmp_path: Path) -> None:
    with weights_file(tmp_path / "w", {"x": described(torch.zeros(3))}) as file:
        with pytest.raises(AssertionError, match="x has 16 bytes, not 12"):
            file.write("x", torch.zeros(4))
        with pytest.raises(KeyError):
            file.write("y", torch.zeros(3))


def test_a_disk_that_is_too_small_says_so_before_it_is_written_to(tmp_path: Path) -> None:
    huge = {"x": described(torch.empty(2**52, device="meta"))}
    with pytest.raises(OSError, match=r"18,014,398,509,481,984 bytes are needed") as caught:
        check_room(tmp_path, huge)
    assert caught.value.errno == errno.ENOSPC
    if os.name == "posix":
        with (
            pytest.raises(OSError, match=r"(No space left on device|File too large): '.*/w'"),
            weights_file(tmp_path / "w", huge),
        ):
            pass
