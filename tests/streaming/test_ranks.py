"""quantize_folder in several processes that torchrun launches: the same bytes, and nobody waits for who is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lobcq_fx
from lobcq_fx.errors import RankError
from lobcq_fx.storage.atomic_folder import unfinished
from lobcq_fx.storage.journal import entries_of
from lobcq_fx.streaming import meeting, skeleton
from lobcq_fx.streaming.shares import divided
from lobcq_fx.streaming.watch import Member
from tests.families import ONE_LAYER
from tests.fuzz.streaming import SETTINGS, contents, float_model, traced_once
from tests.streaming.launched import calibrating
from tests.streaming.test_resume import stop_after

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A float model, one with a weight that is no number, and what becomes of the first in one process."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("float", "float-nan"):
        float_model(folder / name, layers=1)
    shard = sorted((folder / "float-nan").glob("*.safetensors"))[1]
    tensors = load_file(shard)
    tensors[next(one for one in tensors if "proj" in one)][1, 2] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**ONE_LAYER, "num_hidden_layers": 2})
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skeleton, "SMALL", 1024)
        lobcq_fx.quantize_folder(folder / "tiny", folder / "calibrated", **{**SETTINGS, **calibrating()})
    with traced_once():
        lobcq_fx.quantize_folder(folder / "float", folder / "expected", **SETTINGS)
        yield folder


@pytest.fixture(scope="module")
def launch(root: Path) -> subprocess.CompletedProcess[str]:
    """Three ranks, of which one is killed in the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone"]
    return subprocess.run(
        [*command, "-m", "tests.streaming.launched", str(root)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def said(root: Path, launch: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    files = [root / f"several-{rank}.json" for rank in range(3)]
    assert all(file.exists() for file in files), launch.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", ["one", "two", "three", "slow", "group"])
def test_what_is_written_is_the_same_for_any_number_of_ranks(root: Path, said: list[Any], name: str) -> None:
    assert contents(root / name) == contents(root / "expected")
    assert not unfinished(root / name).exists()


@pytest.fixture(scope="module")
def calibrated(root: Path, launch: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    files = [root / f"calibrated-{rank}.json" for rank in range(3)]
    assert all(file.exists() for file in files), launch.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("count", ["two", "three"])
def test_what_is_calibrated_is_the_same_for_any_number_of_ranks(
    root: Path, calibrated: list[dict[str, Any]], count: str
) -> None:
    assert {one[count] for one in calibrated[: 2 if count == "two" else 3]} == {"14 layers"}
    assert contents(root / f"calibrated-{count}") == contents(root / "calibrated")
    assert not unfinished(root / f"calibrated-{count}").exists()


def test_one_rank_goes_on_with_what_several_have_calibrated(root: Path, calibrated: list[dict[str, Any]]) -> None:
    messages = [one["a full disk"] for one in calibrated]
    assert messages[1] == "OSError: [Errno 28] No space left on device: 'some/disk'"
    assert all(one.startswith("RankError: rank 1 on") for one in (messages[0], messages[2]))
    kept, encoded = calibrated[0]["kept"], calibrated[0]["encoded"]
    assert kept
    assert encoded
    assert not {*kept} & {*encoded}
    assert contents(root / "calibrated-full") == contents(root / "calibrated")


def test_each_rank_gets_the_inventory_and_the_first_reports(said: list[Any]) -> None:
    assert [one["three"] for one in said] == ["7 layers"] * 3
    assert [one["steps"] for one in said[1:]] == [[], []]
    encoded = [(done, total) for step, done, total in said[0]["steps"] if step == "encode"]
    assert encoded == sorted(encoded)
    assert encoded[-1] == (7, 7)
    assert ["save", 1, 1] in said[0]["steps"]


def test_other_settings_are_named_and_end_all(root: Path, said: list[Any]) -> None:
    first, second, third = (one["other settings"] for one in said)
    assert third.startswith("CheckpointError: rank 2 on ")
    assert "has other settings than rank 0. Remedy" in third
    assert first == second
    assert first.startswith("RankError: rank 2 on ")
    assert "failed: rank 2 on" in first
    assert not (root / "other").exists()
    assert not unfinished(root / "other").exists()


def test_an_output_that_is_not_shared_is_refused(root: Path, said: list[Any]) -> None:
    messages = [one["another folder"] for one in said]
    assert messages[1].startswith("CheckpointError: rank 1 on")
    assert "does not see" in messages[1]
    assert "on a file system that all ranks share" in messages[1]
    assert all(one.startswith("RankError: rank 1 on") for one in (messages[0], messages[2]))
    assert not list(root.glob("disk-*/*"))


def test_a_full_disk_of_one_rank_ends_all_and_the_next_call_does_the_rest(
    root: Path, said: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [one["a full disk"] for one in said]
    assert messages[1] == "OSError: [Errno 28] No space left on device: 'some/disk'"
    assert all("rank 1 on" in one and "failed: [Errno 28] No space left" in one for one in (messages[0], messages[2]))
    kept = {name for path in unfinished(root / "full").glob("journal*") for name in entries_of(path)}
    assert len(kept) >= 2
    begun = stop_after(1000, monkeypatch, AssertionError)
    lobcq_fx.quantize_folder(root / "float", root / "full", **SETTINGS)
    assert not kept & {*begun}
    assert contents(root / "full") == contents(root / "expected")


def test_a_weight_that_is_no_number_is_named_by_all(said: list[Any]) -> None:
    messages = [one["not a number"] for one in said]
    assert sorted(one.split(":")[0] for one in messages) == ["LobcqError", "RankError", "RankError"]
    assert all("is nan" in one and "cannot encode" in one for one in messages)


def test_a_rank_that_nothing_is_heard_of_ends_the_others(said: list[Any]) -> None:
    for one in (said[0], said[2]):
        assert one["silent"].startswith("RankError: rank 1 on ")
        assert "nothing was heard of it" in one["silent"]
    assert "nothing was heard" in said[1]["silent"]


def test_the_command_prints_once_and_ends_with_the_right_codes(root: Path, said: list[Any]) -> None:
    fresh, taken = ([one["command"][name] for one in said] for name in ("fresh", "taken"))
    assert [code for code, *_ in fresh] == [0, 0, 0]
    assert json.loads(fresh[0][1])["layers_quantized"] == 7
    assert [out for _, out, _ in fresh[1:]] == ["", ""]
    assert "Encode weights" in fresh[0][2]
    assert [messages for *_, messages in fresh[1:]] == ["", ""]
    assert [code for code, *_ in taken] == [4, 4, 4]
    assert "exists: pass --overwrite" in taken[0][2]
    assert len(list((root / "command").glob("lobcq-*"))) > 2


def test_a_killed_rank_is_named_and_what_all_have_done_is_kept(
    root: Path, launch: subprocess.CompletedProcess[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch.returncode == 1
    assert "exitcode  : -9" in launch.stderr
    assert not (root / "killed-2.json").exists()
    for rank in (0, 1):
        error = json.loads((root / f"killed-{rank}.json").read_text())
        assert error.startswith("RankError: rank 2 on ")
        assert "it has ended without a word, as what is killed does" in error
    journals = [f"journal{number}" for number in ("", "-1", "-2")]
    kept = [entries_of(unfinished(root / "killed") / name).keys() for name in journals]
    assert all(kept)
    begun = stop_after(1000, monkeypatch, AssertionError)
    lobcq_fx.quantize_folder(root / "float", root / "killed", **SETTINGS)
    assert not {name for names in kept for name in names} & {*begun}
    assert begun
    assert contents(root / "killed") == contents(root / "expected")


def test_ranks_that_are_started_again_meet_in_the_store_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    words = []
    for delay in (0.0, 0.5, 0.5):  # the first finds the second of the start before
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(meeting.meet, store, Member.this(0), 2)
            time.sleep(delay)
            second = threads.submit(meeting.meet, store, Member.this(1), 2)
        assert first.result() == second.result()
        assert [one.rank for one in first.result()[1]] == [0, 1]
        words.append(first.result()[0])
    assert len({*words}) == 3
    monkeypatch.setattr(meeting, "MEETING", 0.3)
    with pytest.raises(RankError, match=r"rank 1 of 2 has not called quantize_folder"):
        meeting.meet(torch.distributed.HashStore(), Member.this(0), 2)


def test_shares_are_of_like_cost_and_do_not_depend_on_the_order() -> None:
    costs = {"a": 8, "b": 7, "c": 6, "d": 5, "e": 4, "f": 0}
    expected = [["a"], ["b", "e"], ["c", "d"]]
    assert [[name for name in names if name != "f"] for names in divided(costs, 3)] == expected
    assert divided(dict(reversed(costs.items())), 3) == divided(costs, 3)
    assert divided({"a": 1}, 2) == [["a"], []]
