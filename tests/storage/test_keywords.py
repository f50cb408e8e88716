"""The keywords of Hugging Face's `save_pretrained`, and what pickles instead of saving."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.errors import CheckpointError, LobcqError
from tests.passes.graphs import values

X = values(3, 172)


@pytest.fixture(scope="module")
def q():
    torch.manual_seed(0)
    return lobcq_fx.quantize(nn.Sequential(nn.Linear(172, 1000), nn.Linear(1000, 8)).eval(), [X])


def test_keywords_that_change_nothing_are_taken(q, tmp_path):
    keywords = {
        "is_main_process": True,
        "state_dict": None,
        "push_to_hub": False,
        "safe_serialization": True,
        "save_function": torch.save,
        "save_original_format": False,
        "max_shard_size": "5GB",
        "variant": None,
        "token": "hf_of_somebody",
    }
    q.save_pretrained(tmp_path / "plain")
    q.save_pretrained(tmp_path / "with", **keywords)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "with" / file.name).read_bytes() == file.read_bytes()
    assert torch.equal(lobcq_fx.load(tmp_path / "with")(X), q(X))


@pytest.mark.parametrize("limit", [10**6, "1 MB", "1mb", "0.5GB", "1TB", None])
def test_a_shard_that_has_room_for_all_changes_nothing(q, tmp_path, limit):
    q.save_pretrained(tmp_path / "q", max_shard_size=limit)


@pytest.mark.parametrize("keywords", [
    {"push_to_hub": True},
    {"safe_serialization": False},
    {"state_dict": {"0.weight": X}},
    {"is_main_process": False},
    {"variant": "fp16"},
    {"save_function": pickle.dump},
    {"repo_id": "someone/something"},
], ids=lambda keywords: next(iter(keywords)))  # fmt: skip
def test_others_are_refused_by_name_and_nothing_is_written(q, tmp_path, keywords):
    with pytest.raises(CheckpointError, match=rf"does not support {next(iter(keywords))}=.*\. Remedy: \w+"):
        q.save_pretrained(tmp_path / "q", **keywords)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("save", [pickle.dumps, lambda q: torch.save(q, io.BytesIO())], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("around", [lambda q: q, lambda q: nn.Sequential(q), lambda q: {"model": q}])
def test_who_pickles_is_told_what_saves(q, save, around):
    with pytest.raises(LobcqError, match=r"save_pretrained\(folder\) writes it, lobcq_fx\.load\(folder\) opens it"):
        save(around(q))


def test_copies_share_weights_and_deep_copies_do_not(q):
    shallow, deep = copy.copy(q), copy.deepcopy(q)
    expected = q(X)
    weights = [{tensor.data_ptr() for tensor in one.graph_module.buffers()} for one in (q, shallow, deep)]
    assert weights[1] == weights[0]
    assert not weights[2] & weights[0]
    for twin in (shallow, deep):
        assert type(twin) is type(q)
        assert torch.equal(twin(X), expected)
