"""Inventory: coverage, bits and bytes by hand, JSON round trip."""

from __future__ import annotations

import json

import pytest

from lobcq_fx.inventory import Inventory, MatmulRecord
from lobcq_fx.refusal import Refusal

RECORDS = (
    MatmulRecord("q", "linear", (10, 20), format="8x64", mode="w4a4", float_bytes=800, packed_bytes=150),
    MatmulRecord("head", "linear", (30, 20), format="8x64", mode="w4a16", float_bytes=2400, packed_bytes=450),
    MatmulRecord("head again", "linear", (30, 20), format="8x64", mode="w4a16"),
    MatmulRecord("gate", "linear", (5, 20), reason="excluded by pattern '*.gate'", float_bytes=400, packed_bytes=400),
    MatmulRecord("attention", "matmul", None, reason="activation x activation, no constant weight"),
)
REFUSALS = (Refusal("fuse_residual", "q", "its bias is computed"),)
INVENTORY = Inventory(RECORDS, 1000, model_float_bytes=4000, model_packed_bytes=1400, refusals=REFUSALS)


def test_split_in_order():
    assert [record.layer for record in INVENTORY] == ["q", "head", "head again", "gate", "attention"]
    assert [record.layer for record in INVENTORY.quantized] == ["q", "head", "head again"]
    assert [record.layer for record in INVENTORY.left_alone] == ["gate", "attention"]


def test_a_shared_weight_counts_once_in_parameters_and_bits_and_twice_in_work():
    assert INVENTORY.parameter_coverage == pytest.approx((200 + 600) / 1000)
    assert INVENTORY.mac_coverage == pytest.approx((200 + 600 + 600) / (200 + 600 + 600 + 100))
    assert INVENTORY.bits_per_scalar == pytest.approx(8 * (150 + 450) / 800)
    assert RECORDS[-1].macs == 0


def test_json_round_trip():
    assert Inventory.from_dict(json.loads(json.dumps(INVENTORY.to_dict()))) == INVENTORY


def test_empty():
    empty = Inventory((), 0, 0, 0)
    assert (empty.parameter_coverage, empty.mac_coverage, empty.bits_per_scalar) == (0, 0, 0)


def test_counted_multiply_adds_win_over_the_weights_size_and_exclusions_can_be_left_out():
    records = (
        MatmulRecord("q", "linear", (10, 20), format="8x64", mode="w4a4", packed_bytes=150, multiply_adds=600),
        MatmulRecord("conv", "conv2d", None, reason="a convolution, not a matmul", multiply_adds=200),
        MatmulRecord("head", "linear", (30, 20), reason="excluded", multiply_adds=1200, excluded=True),
    )
    inventory = Inventory(records, 1000, 4000, 1400)
    assert inventory.mac_coverage == pytest.approx(600 / 2000)
    assert inventory.asked_coverage == pytest.approx(600 / 800)
    assert [inventory.mac_share([record]) for record in records] == pytest.approx([0.3, 0.1, 0.6])
    assert inventory.parameter_coverage == pytest.approx(200 / 1000)


def test_folders_that_counted_neither_are_read():
    values = json.loads(json.dumps(INVENTORY.to_dict()))
    del values["refusals"]
    for record in values["records"]:
        del record["multiply_adds"], record["excluded"]
    assert Inventory.from_dict(values).records == RECORDS
