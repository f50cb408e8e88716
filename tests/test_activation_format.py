"""Activations in another format than weights: more codebooks, shorter arrays; every path against the format itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx import LobcqConfig, load
from lobcq_fx.errors import CheckpointError, ConfigError
from lobcq_fx.export import export_onnx, register
from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, universal_codebooks
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.modules.packed_weight import PackedWeight
from tests.storage.reindex import reindex

PAIRS = (("8x64", "16x64"), ("8x64", "16x16"), ("4x128", "8x32"), ("8x64", "2x64"))
K = 256


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.side, self.down = nn.Linear(K, 128), nn.Linear(K, 128, bias=False), nn.Linear(128, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)) * self.side(x))


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(2, 5, K, generator=torch.Generator().manual_seed(seed))


def quantized(format: str, activation_format: str) -> lobcq_fx.QuantizedModel:
    config = LobcqConfig(format=format, activation_format=activation_format)
    return lobcq_fx.quantize(Mlp().eval(), config=config, example_inputs=inputs())


def truth(x: Tensor, format: str, activation_format: str) -> Tensor:
    """The model with operands rounded by the reference format, each by its own."""

    def rounded(value: Tensor, name: str, scale: Tensor | None = None) -> Tensor:
        spec = FormatSpec.from_name(name)
        books = universal_codebooks(spec.num_codebooks)
        return decode(encode(value, spec, books, scale, search_scales=scale is None))

    def linear(layer: nn.Linear, value: Tensor) -> Tensor:
        rows = value.flatten(0, -2)
        rows = rounded(rows, activation_format, absmax_row_scale(rows))
        return nn.functional.linear(rows, rounded(layer.weight, format), layer.bias).view(*value.shape[:-1], -1)

    model = Mlp().eval()
    return linear(model.down, torch.relu(linear(model.up, x)) * linear(model.side, x))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_eager_stored_and_after_a_round_trip(pair: tuple[str, str], tmp_path: Path) -> None:
    q, x = quantized(*pair), inputs(2)
    expected = truth(x, *pair)
    assert not torch.allclose(expected, truth(x, pair[0], pair[0]), rtol=1e-3, atol=1e-4)
    assert_close(q(x), expected)
    record = q.inventory.quantized[0]
    assert (record.format, record.activation_format) == pair
    q.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q")
    assert torch.equal(again(x), q(x))
    state, loaded = q.state_dict(), again.state_dict()
    assert set(state) == set(loaded)
    assert all(torch.equal(*(one[name].reshape(-1).view(torch.uint8) for one in (state, loaded))) for name in state)


@torch.no_grad()
@pytest.mark.skipif(weight_layout(torch.device("cpu")) is None, reason="the CPU core was not built, or is switched off")
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_kernels_multiply_in_the_activations_arrays(pair: tuple[str, str]) -> None:
    q = quantized(*pair)
    weights = [module for module in q.modules() if isinstance(module, PackedWeight)]
    assert len(weights) == 3
    assert {(weight.spec.name, weight.kernel_spec.array_size) for weight in weights} == {
        (pair[0], FormatSpec.from_name(pair[1]).array_size)
    }


@torch.no_grad()
@pytest.mark.parametrize("pair", PAIRS[:2], ids="/".join)
def test_compiled(pair: tuple[str, str]) -> None:
    q, x = quantized(*pair), inputs(2)
    assert_close(torch.compile(q, fullgraph=True, backend="aot_eager")(x), q(x))


@torch.no_grad()
@pytest.mark.parametrize("native", [False, True], ids=["function bodies", "library"])
@pytest.mark.parametrize("pair", PAIRS[1:3], ids="/".join)
def test_onnx(pair: tuple[str, str], native: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if native and weight_layout(torch.device("cpu")) is None:
        pytest.skip("the CPU core was not built, or is switched off")
    q, x = quantized(*pair), inputs(2)
    export_onnx(q, tmp_path / "onnx", inputs())
    options = onnxruntime.SessionOptions()
    if native:
        register(options)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", options)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = truth(x, *pair)
    assert (torch.from_numpy(y) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_layer_whose_rows_are_filled_up_stays_in_float_and_says_why() -> None:
    model = nn.Sequential(nn.Linear(K, 200), nn.Linear(200, 64))
    config = LobcqConfig(activation_format="16x16")
    q = lobcq_fx.quantize(model.eval(), config=config, example_inputs=inputs())
    assert [record.reason for record in q.inventory] == [
        None, "K = 200 is no multiple of 64, the weights' arrays, which activations in 16x16 need"
    ]  # fmt: skip


def test_more_codebooks_alone_serve_rows_that_are_filled_up() -> None:
    model, x = nn.Linear(200, 64).eval(), torch.randn(3, 200, generator=torch.Generator().manual_seed(3))
    q = lobcq_fx.quantize(model, config=LobcqConfig(activation_format="16x64"), example_inputs=x)
    rows = decode(encode(x, FormatSpec(16, 64), universal_codebooks(16), absmax_row_scale(x)))
    weight = decode(encode(model.weight, FormatSpec(), universal_codebooks(8), search_scales=True))
    assert_close(q(x), nn.functional.linear(rows, weight, model.bias))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_format": "8x128"}, "arrays of 128 are longer than the weights' in format='8x64'; use one up to"),
        ({"activation_format": "16x64", "mode": "w4a16"}, "contradicts mode='w4a16'"),
        ({"activation_format": "big"}, "write '<codebooks>x<array size>'"),
    ],
)
def test_what_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LobcqConfig(**settings)


def test_overrides_of_layers_that_encode_no_activation_drop_it() -> None:
    config = LobcqConfig(
        activation_format="16x16", overrides={"a": {"mode": "w4a16"}, "b": {"activation_format": None}}
    )
    assert [config.for_layer(layer).activations.name for layer in "abc"] == ["8x64", "8x64", "16x16"]
    again = LobcqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    static = LobcqConfig(activation_scale="static", overrides={"a": {"mode": "w4a16"}})
    assert static.for_layer("a").activation_scale == "per_token"


@pytest.mark.parametrize("size", [128, 48, 0])
def test_a_crafted_array_size_is_a_damaged_folder(size: int, tmp_path: Path) -> None:
    quantized("8x64", "16x16").save_pretrained(tmp_path / "q")
    file = tmp_path / "q" / "graph.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    linears = [node for node in written["nodes"] if node["target"] == "ops.lobcq.linear.default"]
    linears[0]["args"]["tuple"][-1] = size
    file.write_text(json.dumps(written), encoding="utf-8")
    reindex(tmp_path / "q")
    with pytest.raises(CheckpointError):
        load(tmp_path / "q")
