"""The page that is saved with a model says what the model is, and never takes the place of somebody else's."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.model_card import OURS


def quantized(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    return lobcq_fx.quantize(model, config=LobcqConfig(**settings), example_inputs=torch.randn(2, 64))


@pytest.fixture(scope="module")
def q():
    return quantized(overrides={"2": {"mode": "w4a8"}})


def test_what_it_says_is_so(q, tmp_path):
    q.save_pretrained(tmp_path / "q")
    page = (tmp_path / "q" / "README.md").read_text()
    facts = dict(re.findall(r"^\| (.+?) \| (.*) \|$", page, re.MULTILINE))
    assert facts["quantized"] == "1 matmul in W4A4, format 8x64; 1 matmul in W4A8, format 8x64"
    assert facts["bits of a quantized weight"] == f"{q.inventory.bits_per_scalar:.3f}"
    size = sum(p.nbytes for p in nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)).parameters())
    assert facts["all parameters"].startswith(f"{size / 2**10:.1f} KiB, ")
    worst = min(q.inventory, key=lambda record: record.weight_sqnr_db)
    assert f"least in {worst.layer}, {worst.weight_sqnr_db:.1f} dB" in facts["signal to noise, weights"]
    assert "Left in float" not in page


def test_its_code_opens_the_model(q, tmp_path, monkeypatch):
    q.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```py\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    x = torch.randn(3, 64)
    assert torch.equal(names["model"](x), q(x))


def test_what_stays_in_float_is_named_with_its_reason(tmp_path):
    quantized(exclude=["2"]).save_pretrained(tmp_path / "q")
    assert "- 2: excluded by pattern '2'" in (tmp_path / "q" / "README.md").read_text()


def test_saving_again_replaces_ours_and_keeps_others(q, tmp_path):
    page = tmp_path / "q" / "README.md"
    q.save_pretrained(tmp_path / "q")
    page.write_text(f"{OURS}\nof before")
    q.save_pretrained(tmp_path / "q")
    assert "of before" not in page.read_text()
    for mine in (b"my notes", b"\xff\xfe no text"):
        page.write_bytes(mine)
        q.save_pretrained(tmp_path / "q")
        assert page.read_bytes() == mine
