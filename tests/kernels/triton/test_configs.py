"""Which configuration a launch gets, what a GPU's file may hold, and how candidates are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lobcq_fx.errors import LobcqError
from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.triton import configs
from lobcq_fx.kernels.triton.configs import (
    DecodeConfig,
    PrefillConfig,
    Shape,
    forget,
    read_tables,
    row_bucket,
    rows_to_warm,
    write_tables,
)
from lobcq_fx.kernels.triton.tune import fastest

SHAPE = Shape(4, 4096, 4096, FormatSpec(8, 64), torch.int8)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where GPUs' files are looked for."""
    forget()
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    yield tmp_path
    forget()


def test_a_tuned_shape_gets_its_own_and_others_the_default(folder: Path) -> None:
    tuned = DecodeConfig(panels=2, enough_programs=7)
    write_tables(folder / "cpu.json", {SHAPE.key: tuned}, {SHAPE.key: PrefillConfig(group=3)})
    assert configs.decode_config(SHAPE, CPU) == tuned
    assert configs.prefill_config(SHAPE, CPU) == PrefillConfig(group=3)
    other = Shape(8, 4096, 4096, FormatSpec(8, 64), torch.int8)
    assert configs.decode_config(other, CPU) == DecodeConfig()
    three_terms = Shape(32, 64, 64, FormatSpec(8, 64), torch.float32)
    assert configs.prefill_config(three_terms, CPU) == PrefillConfig(tile_m=64, tile_n=32, warps=4)
    assert configs.decode_config(three_terms, CPU) == DecodeConfig(panels=2, unroll=1)


def test_a_gpu_without_a_file_gets_the_default(folder: Path) -> None:
    assert configs.decode_config(SHAPE, CPU) == DecodeConfig()


def test_shipped_files_are_valid() -> None:
    for path in configs.FOLDER.glob("*.json"):
        read_tables(path)


def test_shapes_are_told_apart_by_buckets_of_rows() -> None:
    assert [row_bucket(rows) for rows in (1, 3, 16, 17, 4096, 9999)] == [1, 4, 16, 32, 4096, 4096]
    of = Shape.of(torch.empty(3, 4096, dtype=torch.int8), 4096, FormatSpec(8, 64))
    assert of == SHAPE
    assert of.key == "4 4096 4096 8x64 int8"


VALID = {"panels": 4, "unroll": 2, "stages": 3, "enough_programs": 528, "max_splits": 16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ('{"deocde": {}}', "has to hold 'decode' and 'prefill', and nothing else"),
        ('{"decode": {"4 4096": {}}}', "write '<rows> <N> <K> <format> <dtype>'"),
        ('{"decode": {"4 1 1 8x64 int8": {"panels": 4}}}', "has to hold enough_programs, max_splits, panels, stages"),
        (json.dumps({"decode": {"4 1 1 8x64 int8": VALID | {"panels": 3}}}), "panels=3: write a power of two"),
        (json.dumps({"decode": {"4 1 1 8x64 int8": VALID | {"unroll": "2"}}}), "unroll='2': write a positive integer"),
    ],
)
def test_what_a_file_may_not_hold(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(LobcqError, match=message) as caught:
        read_tables(path)
    assert str(path) in str(caught.value)


def test_a_tile_of_prefill_is_made_of_tiles_of_weights() -> None:
    with pytest.raises(LobcqError, match="a tile is 16 rows x 128 columns"):
        PrefillConfig(step_columns=256)


def test_candidates_are_distinct_and_begin_with_the_default() -> None:
    decode, prefill = list(configs.decode_candidates(SHAPE)), list(configs.prefill_candidates(SHAPE))
    assert (decode[0], prefill[0]) == (DecodeConfig(), PrefillConfig())
    assert len(set(decode)) == len(decode)
    assert len(set(prefill)) == len(prefill)


def results(times: dict[int, float]) -> Callable[[DecodeConfig], list[Tensor]]:
    def run(config: DecodeConfig) -> list[Tensor]:
        if config.unroll not in times:
            raise OutOfResources(2, 1, "shared memory")
        return [torch.tensor([1.0, times[config.unroll]])]

    return run


def test_the_fastest_that_can_run_is_chosen() -> None:
    run, candidates = results({1: 1.0, 2: 1.0}), [DecodeConfig(unroll=n) for n in (1, 2, 3)]
    elapsed = iter((5.0, 3.0))
    assert fastest(run, candidates, [torch.tensor([1.0, 1.0])], lambda call: next(elapsed)) == (candidates[1], 3.0)
    with pytest.raises(LobcqError, match="no candidate can run"):
        fastest(run, candidates[2:], [torch.ones(2)], lambda call: 0.0)


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_wrong_result_is_an_error(wrong: float) -> None:
    with pytest.raises(LobcqError, match=r"DecodeConfig\(.*unroll=2.*\) is off by"):
        fastest(results({2: wrong}), [DecodeConfig()], [torch.ones(2)], lambda call: 0.0)


def test_rows_to_warm() -> None:
    """One row, up to eight, more, sixteen; then multiples of 16 and others, in every bucket."""
    assert rows_to_warm(40) == [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32]
    assert rows_to_warm(1) == [1]
