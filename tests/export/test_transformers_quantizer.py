"""LobcqQuantizer in transformers' own exporters, against `quantize`."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from transformers.exporters.configs import ExecutorchConfig, ExportFormat
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

import lobcq_fx
from lobcq_fx.errors import CalibrationError, ConfigError
from lobcq_fx.export import LobcqQuantizer
from lobcq_fx.export.transformers_quantizer import LobcqQuantizer as Named
from tests.families import causal_lm

# transformers' runners read pytree structures by names that torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def quiet_logs(caplog):
    """torch.export logs thousands of lines, which pytest would keep."""
    caplog.set_level(logging.ERROR)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


IDS = torch.arange(14).view(2, 7)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@torch.no_grad()
def test_both_exporters_compute_what_quantize_does():
    """With W4A4 layers and W4A16 ones."""
    config = lobcq_fx.LobcqConfig(overrides={"*.mlp.*": {"mode": "w4a16"}})
    model = causal_lm("llama", num_hidden_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    q = lobcq_fx.quantize(model, config=config, static_cache=False)
    expected = q(**INPUTS, use_cache=False).logits
    program = DynamoExporter().export(
        model, INPUTS, config=DynamoConfig(dynamic=True, quantizer=LobcqQuantizer(config))
    )
    torch.testing.assert_close(program(**INPUTS).logits, expected, rtol=1e-4, atol=1e-5)

    exported = OnnxExporter().export(model, INPUTS, config=OnnxConfig(dynamic=True, quantizer=LobcqQuantizer(config)))
    nodes = Counter(node.op_type for node in exported.program.graph.all_nodes() if node.domain == "lobcq")
    assert nodes == Counter({"Linear": 4, "LinearFloatActivation": 3, "QuantizeActivation": 2})
    assert {name for _, name, _ in exported.program.functions} == set(nodes)
    torch.testing.assert_close(torch.as_tensor(exported(**INPUTS)["logits"]), expected, rtol=1e-4, atol=1e-5)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"activation_scale": "static"}, {"rounding": "compensated"}], ids=str)
def test_what_needs_data_is_calibrated(settings):
    config = lobcq_fx.LobcqConfig(**settings)
    model, data = (
        causal_lm("llama", num_hidden_layers=1),
        [{"input_ids": IDS + offset, "attention_mask": INPUTS["attention_mask"]} for offset in (0, 9)],
    )
    expected = lobcq_fx.quantize(model, data, config, static_cache=False)(**INPUTS, use_cache=False).logits
    quantizer = LobcqQuantizer(config, calibration_dataset=data)
    program = DynamoExporter().export(model, INPUTS, config=DynamoConfig(dynamic=True, quantizer=quantizer))
    torch.testing.assert_close(program(**INPUTS).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(CalibrationError, match="pass calibration_dataset"):
        DynamoExporter().export(model, INPUTS, config=DynamoConfig(quantizer=LobcqQuantizer(config)))


def test_refusals():
    with pytest.raises(ValueError, match="quantizes dynamo, onnx exports"):
        LobcqQuantizer().validate_environment(ExecutorchConfig().export_format)
    LobcqQuantizer().validate_environment(ExportFormat.ONNX)
    nothing = lobcq_fx.LobcqConfig(exclude=("*",))
    model = causal_lm("llama", num_hidden_layers=1)
    with pytest.raises(ConfigError, match="nothing to quantize"):
        DynamoExporter().export(model, INPUTS, config=DynamoConfig(quantizer=LobcqQuantizer(nothing)))
    assert Named is LobcqQuantizer
