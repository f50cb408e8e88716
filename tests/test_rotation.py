"""Rotation within block arrays: exact in float, chosen by measured error, in every graph and every form of a model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.calibration.rounding_error import expected_error
from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.errors import CalibrationError, ConfigError
from lobcq_fx.export import export_onnx, register
from lobcq_fx.float_weights import FloatWeights
from lobcq_fx.format import FormatSpec, decode, encode, rotate, universal_codebooks
from lobcq_fx.graph.attributes import register_attribute
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.passes.insert_observers import InsertObservers, observed
from lobcq_fx.pipeline import make_plan
from lobcq_fx.rotation import rotate as choose_rotations
from lobcq_fx.tracing.trace import MAIN, trace_module
from tests.families import causal_lm

K = 128
lobcq = torch.ops.lobcq


class TwoLayers(nn.Module):
    """`spiky`'s input has a column of its array that stands out; `even`'s input gains nothing by a rotation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spiky, self.other = nn.Linear(K, K), nn.Linear(K, 48)
        self.even = nn.Linear(K, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.even(torch.sign(self.spiky(x))) + self.other(x).sum(-1, keepdim=True)


def data(seed: int = 1) -> Tensor:
    x = torch.randn(2, 60, K, generator=torch.Generator().manual_seed(seed))
    x[..., 5] *= 25
    x[..., 70] *= 25
    return x


def test_expected_error_is_that_of_rounding_both() -> None:
    """Against the reference format on whole rows: nothing sampled, every product computed."""
    spec, x, w = FormatSpec(8, 64), data().flatten(0, 1), torch.randn(40, K) * 0.1
    x[:3], x[3:6, :64] = 0, 0  # a padding token's row, an array that a ReLU left nothing of
    statistics = ActivationStatistics("layer", spec)
    statistics.update(x)
    expected = expected_error(statistics, [(lambda: [w], spec)], "w4a4")
    codebooks = universal_codebooks(8)
    activation = torch.cat([row - decode(encode(row, spec, codebooks)) for row in x.split(1)])
    weight = w - decode(encode(w, spec, codebooks))
    products = ((activation @ w.T).square().sum() + (x @ weight.T).square().sum()) / len(x)
    assert expected == pytest.approx(float(products), rel=0.15)  # columns' errors taken as independent, scales searched
    float_activation, int8_activation = (
        expected_error(statistics, [(lambda: [w], spec)], mode) for mode in ("w4a16", "w4a8")
    )
    assert float_activation < int8_activation < expected


def test_second_moments_are_those_of_rotated_rows() -> None:
    x, divisor = data().flatten(0, 1), torch.exp2(torch.arange(K) % 5 - 2.0)
    seen = ActivationStatistics("layer", FormatSpec(8, 64))
    seen.update(x)
    rows = rotate(x / divisor, 32).double()
    found = seen.divided(divisor).rotated(32)
    torch.testing.assert_close(found.encoded_moments(x.T @ x), (rows.T @ rows).float(), rtol=1e-4, atol=1e-2)
    arrays = rotate(x / divisor, 32).view(-1, 64)
    missing = (found.sample()[:, None] - arrays).abs().amax(2).amin(1)
    assert float(missing.max()) < 1e-3


@torch.no_grad()
def test_it_is_chosen_where_it_lowers_the_error_for_all_that_read_an_activation() -> None:
    model, x = TwoLayers(), data()
    graph_module = trace_module(model, (x,)).graph_module
    plan, _ = make_plan({MAIN: graph_module}, LobcqConfig(rotation="hadamard"))
    InsertObservers(plan)(graph_module)
    graph_module(x)
    weights = FloatWeights(graph_module)
    result = choose_rotations(plan, weights, observed(graph_module, plan))
    assert {one.layer for one in result.matmuls} == {"spiky", "other"}
    for one in plan.quantized:
        assert one.weight is not None
        changed = torch.equal(result.weights(one.weight), weights(one.weight))
        assert changed == (one.layer == "even")
    q = lobcq_fx.quantize(model, [x], LobcqConfig(rotation="hadamard"))
    assert {record.layer: record.rotated for record in q.inventory.quantized} == {
        "spiky": True,
        "other": True,
        "even": False,
    }


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"mode": "w4a8"}, {"activation_format": "16x16"}, {"format": "16x128"}])
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_outputs_come_closer_and_survive_a_round_trip(settings: dict[str, str], rounding: str, tmp_path: Path) -> None:
    x, model = data(9), TwoLayers().spiky
    errors = {}
    for rotation in ("none", "hadamard"):
        q = lobcq_fx.quantize(model, [data()], LobcqConfig(rotation=rotation, rounding=rounding, **settings))
        errors[rotation] = float((q(x) - model(x)).square().mean())
    chosen = q.inventory.quantized[0].rotated
    assert chosen == ("mode" not in settings and "activation_format" not in settings)  # too little to gain in those
    assert errors["hadamard"] * 1.3 < errors["none"] if chosen else errors["hadamard"] == errors["none"]
    q.save_pretrained(tmp_path / "q")
    assert torch.equal(lobcq_fx.load(tmp_path / "q")(x), q(x))


@torch.no_grad()
def test_folders_that_rotate_by_a_product_with_a_matrix(tmp_path: Path) -> None:
    """As they were written before there was `lobcq::rotate`."""
    q, x = lobcq_fx.quantize(TwoLayers().spiky, [data()], LobcqConfig(rotation="hadamard")), data(9)
    graph, matrix = q.stored_graph, "lobcq.hadamard_64"
    register_attribute(q.graph_module, matrix, rotate(torch.eye(64), 64))
    (node,) = (node for node in graph.nodes if node.target is lobcq.rotate.default)
    with graph.inserting_before(node):
        arrays = graph.call_function(torch.ops.aten.unflatten.int, (node.args[0], -1, [K // 64, 64]))
        mixed = graph.call_function(torch.ops.aten.matmul.default, (arrays, graph.get_attr(matrix)))
        node.replace_all_uses_with(graph.call_function(torch.ops.aten.flatten.using_ints, (mixed, -2, -1)))
    graph.erase_node(node)
    q.save_pretrained(tmp_path / "q")
    expected = q(x)
    difference = (lobcq_fx.load(tmp_path / "q")(x) - expected).abs()
    assert float(difference.median()) <= 1e-5 * float(expected.abs().max())  # sums in another order may flip a code


@torch.no_grad()
def test_compiled() -> None:
    q = lobcq_fx.quantize(TwoLayers(), [data()], LobcqConfig(rotation="hadamard"))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(q, fullgraph=True, backend="aot_eager")(data(9)), q(data(9)))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
def test_every_mode(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated whether or not that pays: the float product stays the same, and so does the error's magnitude."""
    monkeypatch.setattr("lobcq_fx.rotation.LEAST_GAIN", -math.inf)
    model, x = TwoLayers().bfloat16(), data(9).bfloat16()
    plain, q = (
        lobcq_fx.quantize(model, [data().bfloat16()], LobcqConfig(mode=mode, rotation=one))
        for one in ("none", "hadamard")
    )
    assert all(record.rotated for record in q.inventory.quantized)
    expected = model(x).float()
    errors = [float((one(x).float() - expected).square().mean()) for one in (plain, q)]
    assert errors[1] < 2 * errors[0]
    assert q(x).dtype == torch.bfloat16
    q.save_pretrained(tmp_path / "q")
    assert torch.equal(lobcq_fx.load(tmp_path / "q")(x), q(x))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(q, fullgraph=True, backend="aot_eager")(x), q(x))


@torch.no_grad()
def test_a_language_model_is_rotated_in_every_graph_of_it() -> None:
    model = causal_lm("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    for layer in model.model.layers:
        layer.input_layernorm.weight[5::32] *= 60
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(2))
    config = LobcqConfig.of_recipe("best", smoothing="none")
    q = lobcq_fx.quantize(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], config=config)
    assert sum(record.rotated for record in q.inventory.quantized) >= 2
    growing, static = (q.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation=kind)
                       for kind in (None, "static"))  # fmt: skip
    assert torch.equal(growing, static)
    layout = weight_layout(torch.device("cpu"))
    if layout is None:
        return
    logits = q(ids).logits
    q._restore()
    q._lower(layout, torch.device("cuda"))  # whose passes fuse what stands before the encoders
    calls = [node for node in q.graph_module.graph.nodes if node.target is lobcq.linear_prepacked.rms_norm]
    assert any(call.args[-1] for call in calls)
    assert float((q(ids).logits - logits).abs().median()) < 1e-4 * float(logits.std())


@torch.no_grad()
@pytest.mark.parametrize("native", [False, True], ids=["function bodies", "library"])
def test_onnx(native: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if native and weight_layout(torch.device("cpu")) is None:
        pytest.skip("the CPU core was not built, or is switched off")
    x = data(9)
    q = lobcq_fx.quantize(TwoLayers().spiky, [data()], LobcqConfig(rotation="hadamard"))
    assert q.inventory.quantized[0].rotated
    export_onnx(q, tmp_path / "onnx", data())
    options = onnxruntime.SessionOptions()
    if native:
        register(options)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", options)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    difference = (torch.from_numpy(y) - q(x)).abs()
    assert float(difference.median()) <= 1e-5 * float(q(x).abs().max())
    assert float(difference.max()) <= 0.05 * float(q(x).abs().max())  # products in another order may flip a code


@torch.no_grad()
def test_onnx_with_activations_in_float(tmp_path: Path) -> None:
    """They are rotated there too: without, nothing would be left of the product."""
    onnxruntime = pytest.importorskip("onnxruntime")
    x, layer = data(9), TwoLayers().spiky
    q = lobcq_fx.quantize(layer, [data()], LobcqConfig(rotation="hadamard"))
    assert q.inventory.quantized[0].rotated
    export_onnx(q, tmp_path / "onnx", data(), target="matmulnbits")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    errors = [float((one - layer(x)).square().mean()) for one in (torch.from_numpy(y), q(x))]
    assert errors[0] < errors[1]


def test_what_it_cannot_do_is_refused_or_left_alone() -> None:
    with pytest.raises(ConfigError, match="rotation='none'"):
        LobcqConfig(rotation="hadamard", activation_scale="static")
    with pytest.raises(ConfigError, match="did you mean 'hadamard'"):
        LobcqConfig(rotation="hadamar")
    with pytest.raises(CalibrationError, match="rotation"):
        lobcq_fx.quantize(TwoLayers(), None, LobcqConfig(rotation="hadamard"))
    x = torch.randn(3, 10, 40)
    x[..., 5] *= 30
    q = lobcq_fx.quantize(nn.Linear(40, 16), [x], LobcqConfig(rotation="hadamard"))  # no whole arrays
    assert not any(record.rotated for record in q.inventory.quantized)
