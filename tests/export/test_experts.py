"""Mixtures of experts as ONNX models, which the export runs in ONNX Runtime and compares with the torch model."""

from __future__ import annotations

import math

import torch

import lobcq_fx
from tests.frontends.test_experts import float_model


def test_treated_experts_run_in_onnx_runtime(tmp_path, monkeypatch):
    """Smoothed, rotated and compensated."""
    monkeypatch.setattr("lobcq_fx.rotation.LEAST_GAIN", -math.inf)
    data = [torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))]
    q = lobcq_fx.quantize(float_model("mixtral"), data, recipe="best", static_cache=False)
    experts = [record for record in q.inventory.quantized if ".experts." in record.layer]
    assert [(record.smoothing, record.rotated) for record in experts] == [("folded", True), ("folded", False)]
    summary = lobcq_fx.export_onnx(q, tmp_path / "exported")
    assert summary.nodes["lobcq::GroupedLinear"] == 2
    assert summary.differences.functions < 1e-3
    assert summary.differences.library is None or summary.differences.library < 1e-3
    assert summary.differences.moved_codes < 0.05


def test_experts_keep_their_operator_in_a_model_of_matmulnbits(tmp_path):
    """MatMulNBits has no stacks: the linears become that, experts, here in groups of one size, stay ours."""
    q = lobcq_fx.quantize(float_model("llama4"), static_cache=False)
    summary = lobcq_fx.export_onnx(q, tmp_path / "exported", target="matmulnbits")
    assert summary.nodes["lobcq::GroupedLinearFloatActivation"] == 2
    assert summary.nodes["com.microsoft::MatMulNBits"] == 7
