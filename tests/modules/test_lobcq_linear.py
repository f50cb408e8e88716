"""A linear on a packed weight: the ops on stored and on prepacked weights, moves, casts, copies, state."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from torch import nn

from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.errors import ConfigError, LobcqError, OperandError
from lobcq_fx.format import (
    Encoded,
    FormatSpec,
    absmax_row_scale,
    decode,
    encode,
    encode_int8,
    matmul,
    rotation,
    universal_codebooks,
)
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.modules.lobcq_linear import LobcqLinear
from lobcq_fx.modules.packed_product import LinearSettings
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight

N, K = 24, 128
WEIGHT = FormatSpec(8, 64)
CPU = torch.device("cpu")

SETTINGS = {
    "w4a4": LinearSettings(WEIGHT, "w4a4", WEIGHT),
    "w4a4, shorter arrays": LinearSettings(WEIGHT, "w4a4", FormatSpec(16, 16)),
    "w4a4, static": LinearSettings(WEIGHT, "w4a4", WEIGHT, static_scale=True),
    "w4a4, scaled": LinearSettings(WEIGHT, "w4a4", WEIGHT, input_scale=True),
    "w4a8": LinearSettings(WEIGHT, "w4a8", WEIGHT),
    "w4a8, static": LinearSettings(WEIGHT, "w4a8", WEIGHT, static_scale=True),
    "w4a16": LinearSettings(WEIGHT, "w4a16", WEIGHT),
    "w4a16, scaled": LinearSettings(WEIGHT, "w4a16", WEIGHT, input_scale=True),
}
EACH = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def no_layout(device):
    return None


def linear(settings, layout_of=weight_layout, bias=True):
    """One with content, not prepacked."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(N), requires_grad=False) if bias else None
    one = LobcqLinear((N, K), parameter, settings, layout_of, dtype=torch.float32, device=CPU)
    codebooks = universal_codebooks(settings.spec.num_codebooks)
    one.weight = PackedWeight(encode_weight(torch.randn(N, K), settings.spec, codebooks, "w"))
    one.codebooks = codebooks
    if one.activation_codebooks is not None:
        one.activation_codebooks = universal_codebooks(settings.activations.num_codebooks)
    if one.activation_scale is not None:
        one.activation_scale = torch.tensor(0.002)
    if one.input_scale is not None:
        one.input_scale = torch.exp2(torch.randint(-3, 4, (K,)).float())
    return one


def prepacked(settings, **others):
    one = linear(settings, **others)
    one.prepack()
    return one


def activation():
    torch.manual_seed(1)
    return torch.randn(2, 5, K)


def expected(one, x):
    """By the format alone."""
    settings, rows = one.settings, x.flatten(0, 1)
    rows = rows if one.input_scale is None else rows * one.input_scale
    parts = {part: getattr(one.weight, part) for part in PARTS}
    w = Encoded(**parts, codebooks=one.codebooks, spec=settings.spec, columns=K)
    if settings.mode == "w4a16":
        out = rows @ decode(w).T
    elif settings.mode == "w4a8":
        out = matmul(encode_int8(rows, settings.spec.array_size, one.activation_scale), w)
    else:
        scale = absmax_row_scale(rows) if one.activation_scale is None else one.activation_scale
        out = matmul(encode(rows, settings.activations, one.activation_codebooks, scale), w)
    return (out if one.bias is None else out + one.bias).view(2, 5, N)


@EACH
def test_it_computes_what_the_format_says(settings):
    one, x = linear(settings, layout_of=no_layout), activation()
    wanted = expected(one, x)
    torch.testing.assert_close(one(x), wanted, rtol=1e-5, atol=1e-4)
    one.prepack()
    assert one.weight.layout is None, "the device has no layout"
    prepacked_one = prepacked(settings)
    if weight_layout(CPU) is not None:
        assert not hasattr(prepacked_one.weight, "codes")
    torch.testing.assert_close(prepacked_one(x), wanted, rtol=1e-5, atol=1e-4)


def test_without_a_bias():
    one = linear(SETTINGS["w4a4"], bias=False)
    wanted = expected(one, activation())
    one.prepack()
    torch.testing.assert_close(one(activation()), wanted, rtol=1e-5, atol=1e-4)


@EACH
def test_a_cast_changes_neither_bytes_nor_calibrated_scales(settings):
    one = prepacked(settings)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    one.to(torch.bfloat16)
    for name, tensor in one.state_dict().items():
        kept = before[name].to(torch.bfloat16) if name in ("bias", "input_scale") else before[name]
        assert tensor.dtype == kept.dtype
        assert torch.equal(tensor, kept), name
    assert one(activation().bfloat16()).dtype == torch.bfloat16


def test_a_move_gives_the_weight_the_layout_of_the_new_device():
    """The CPU's kernels are the only ones here: the other device is "meta", which none are made for."""
    one, asked = prepacked(SETTINGS["w4a4, static"]), []
    one.layout_of = lambda device: asked.append(device)
    one.to("meta")
    assert asked == [torch.device("meta")]
    assert one.weight.layout is None
    assert one.weight.codes.shape == (N, K // 2)
    assert not hasattr(one, "codebook_tables")
    assert {tensor.device.type for tensor in one.state_dict().values()} == {"meta"}


def test_copies_share_nothing():
    one = prepacked(SETTINGS["w4a4"])
    two, wanted = deepcopy(one), one(activation())
    for tensor in (one.weight.prepacked, one.codebooks, one.bias.data):  # tables are the process's
        tensor.zero_()
    assert torch.equal(two(activation()), wanted)


def test_state_is_that_of_the_format_and_brings_its_codebooks():
    one, other = prepacked(SETTINGS["w4a4, static"]), linear(SETTINGS["w4a4, static"])
    other.codebooks = other.codebooks.flip(0)
    other.activation_codebooks = other.activation_codebooks.flip(0)
    names = {f"weight.{part}" for part in PARTS} | {"bias", "codebooks", "activation_codebooks", "activation_scale"}
    assert one.state_dict().keys() == other.state_dict().keys() == names
    wanted = expected(other, activation())
    one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one(activation()), wanted, rtol=1e-5, atol=1e-4)


ROTATED = LinearSettings(WEIGHT, "w4a8", WEIGHT, input_scale=True, rotated=True)


@pytest.mark.parametrize("settings", [*SETTINGS.values(), ROTATED], ids=[*SETTINGS, "w4a8, scaled, rotated"])
def test_the_activation_gets_the_gradient_of_the_decoded_weight(settings):
    one, x = linear(settings, layout_of=no_layout), activation().requires_grad_()
    stored = Encoded(
        **{part: getattr(one.weight, part) for part in PARTS}, codebooks=one.codebooks, spec=settings.spec, columns=K
    )
    weight = rotation.rotate(decode(stored), settings.spec.array_size) if settings.rotated else decode(stored)
    weight = weight if one.input_scale is None else weight * one.input_scale
    outwards = torch.randn(2, 5, N)
    (wanted,) = torch.autograd.grad(x @ weight.T, x, outwards)
    one.prepack()
    for layer in (one, prepacked(settings)):
        (gradient,) = torch.autograd.grad(layer(x), x, outwards)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x).detach(), layer(x.detach()))


def test_a_bias_is_not_trained():
    one = prepacked(SETTINGS["w4a4"])
    one.bias.requires_grad_()
    with pytest.raises(LobcqError, match=r"bias.*requires_grad_\(False\)"):
        one(activation())
    with torch.no_grad():
        one(activation())


@EACH
@pytest.mark.parametrize("columns", [K - 1, K + 1])
def test_another_number_of_columns_is_refused(settings, columns):
    with pytest.raises(OperandError, match=rf"x is \[2, {columns}\]: the layer takes \[\.\.\., {K}\]"):
        prepacked(settings)(torch.randn(2, columns))


@EACH
def test_settings_are_written_and_read(settings):
    assert LinearSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("changes", [{"mode": "w5"}, {"format": "3x7"}, {"activation_format": "8x128"}])
def test_settings_that_are_none_are_refused(changes):
    with pytest.raises(ConfigError):
        LinearSettings.from_dict({**SETTINGS["w4a4"].to_dict(), **changes})
