"""A budget of bits: kept, spent where the results need it, and decided into settings that can be used again."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.budget import Option, rounded_activation, rounded_operand, spend
from lobcq_fx.config import RECIPES
from lobcq_fx.errors import CalibrationError, ConfigError
from lobcq_fx.export.transformers_quantizer import LobcqQuantizer
from lobcq_fx.format import FormatSpec, decode, decode_stack, encode, encode_stack, universal_codebooks
from lobcq_fx.pipeline import fit_shared_codebooks
from tests.families import causal_lm

K = 128


class Uneven(nn.Module):
    """`loud` makes nearly all of the result, `quiet` a thousandth of it; both are of one size and read one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.between, self.quiet = (nn.Linear(K, K, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(torch.relu(x)) + 1e-3 * self.quiet(self.between(x) * 1e-3)


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 40, K, generator=generator) for _ in range(3)]


def quantized(**settings: object) -> lobcq_fx.QuantizedModel:
    return lobcq_fx.quantize(Uneven(), data(), LobcqConfig(**settings))


def average_bits(q: lobcq_fx.QuantizedModel) -> tuple[float, float]:
    """Of weights and activations, by the inventory: all three layers count alike."""
    modes = {"w4a4": None, "w4a8": 8 + 8 / 64, "w4a16": 16.0}
    weights, activations = [], []
    for record in q.inventory:
        if record.format is None:
            weights.append(16.0)
            activations.append(16.0)
            continue
        weights.append(FormatSpec.from_name(record.format).bits_per_scalar)
        own = FormatSpec.from_name(record.activation_format or record.format).bits_per_scalar
        activations.append(modes[record.mode] or own)
    return sum(weights) / 3, sum(activations) / 3


@pytest.mark.parametrize(("bits", "activation_bits"), [(4.5, None), (4.4, 5.0), (4.6, 8.2), (9.0, 9.0)])
def test_both_budgets_are_kept_and_used(bits: float, activation_bits: float | None) -> None:
    q = quantized(bits=bits, activation_bits=activation_bits)
    own, other = average_bits(q)
    assert own <= bits + 1e-6
    assert other <= (activation_bits or bits) + 1e-6
    # Any of the three could still take another codebook for at most a third of an eighth of a bit.
    assert own > min(bits, 4.625) - 1 / 24 - 1e-6 or other > (activation_bits or bits) - 1 / 24 - 1e-6


def test_weights_are_rounded_along_what_is_summed() -> None:
    """Experts too, which matmuls read the other way round."""
    spec, stack = FormatSpec(4, 32), torch.randn(3, 48, 64, generator=torch.Generator().manual_seed(0))
    books = universal_codebooks(4)
    experts = decode_stack(encode_stack(stack, spec, books, search_scales=True))
    torch.testing.assert_close(rounded_operand(stack.mT, spec).mT, experts)
    one = decode(encode(stack[0], spec, books, search_scales=True))
    torch.testing.assert_close(rounded_operand(stack[0], spec), one)


def test_bits_go_where_the_results_need_them() -> None:
    q = quantized(bits=4.5, activation_bits=6.0)
    records = {record.layer: record for record in q.inventory}
    loud, quiet = records["loud"], records["quiet"]
    assert loud.format == "16x64"
    assert FormatSpec.from_name(quiet.format).num_codebooks < 16
    assert loud.mode == "w4a8" or FormatSpec.from_name(loud.activation_format).array_size == 16
    x = data()[0]
    plain = quantized()
    expected = Uneven()(x)
    same_bits = quantized(bits=4.5)  # of both operands
    assert (same_bits(x) - expected).norm() < (plain(x) - expected).norm()


def test_nothing_better_fits() -> None:
    """Against all combinations, on random options."""
    generator = torch.Generator().manual_seed(0)
    limits = (4.6, 5.2)
    for _ in range(20):
        options = []
        for _ in range(4):
            scale = float(10 * torch.rand((), generator=generator))
            bits = [(a, b) for a in (4.25, 4.5, 4.625) for b in (4.5, 5.0, 8.0)]
            options.append([Option(None, one, scale * (2 ** -one[0] + 3 * 2 ** -one[1])) for one in bits])
        sizes = [int(one) for one in torch.randint(1, 9, (4,), generator=generator)]

        def fits(chosen: tuple[Option, ...], sizes: list[int] = sizes) -> bool:
            means = [sum(n * one.bits[i] for n, one in zip(sizes, chosen, strict=True)) / sum(sizes) for i in range(2)]
            return all(mean <= limit + 1e-9 for mean, limit in zip(means, limits, strict=True))

        taken = spend(options, (sizes, sizes), limits)
        assert taken is not None
        assert fits(tuple(taken))
        best = min(sum(one.error for one in some) for some in itertools.product(*options) if fits(some))
        assert sum(one.error for one in taken) <= 1.002 * best


def test_what_was_decided_can_be_used_again() -> None:
    q = quantized(bits=4.5, activation_bits=5.0)
    decided = q.lobcq_config
    assert decided.bits is None
    assert decided.activation_bits is None
    again = lobcq_fx.quantize(Uneven(), data(), LobcqConfig.from_dict(decided.to_dict()))
    x = data()[0]
    assert torch.equal(again(x), q(x))


def test_overrides_win_and_count() -> None:
    q = quantized(bits=4.5, overrides={"loud": {"format": "2x64"}})
    records = {record.layer: record for record in q.inventory}
    assert records["loud"].format == "2x64"
    assert records["between"].format == "16x64"
    with pytest.raises(ConfigError, match=r"the least that these layers take, .* is 4\.375 and 4\.375"):
        quantized(bits=4.2, overrides={"loud": {"format": "16x64"}})


@pytest.mark.parametrize("mode", ["w4a8", "w4a16"])
def test_other_modes_keep_their_activations(mode: str) -> None:
    q = quantized(bits=4.5, mode=mode)
    assert {record.mode for record in q.inventory} == {mode}
    assert len({record.format for record in q.inventory}) > 1


def test_a_language_model_is_weighed_by_its_next_tokens() -> None:
    """Layers that read one activation get one format of it, so that it is encoded once."""
    model = causal_lm("llama")
    calls = [torch.randint(0, model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))]
    steps: list[tuple[str, int, int | None]] = []
    q = lobcq_fx.quantize(
        model, calls, LobcqConfig.auto(4.5, 5.0), progress=lambda *step: steps.append(step), static_cache=False
    )
    records = {record.layer: record for record in q.inventory.quantized}
    for layer in range(model.config.num_hidden_layers):
        own = [records[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkv"]
        assert len({(one.mode, one.activation_format, one.format) for one in own}) == 1
    weighed = [step for step in steps if step[0] == "weigh layers"]
    assert weighed[-1][1] == weighed[-1][2] == 4 * model.config.num_hidden_layers
    assert q.generate(calls[0], max_new_tokens=3, do_sample=False).shape == (1, 27)


@pytest.mark.parametrize("mode", ["w4a4", "w4a8"])
def test_an_activation_is_rounded_as_a_layer_rounds_it(mode: str) -> None:
    identity = nn.Linear(K, K, bias=False)
    identity.weight.data = torch.eye(K)
    config = LobcqConfig(mode=mode, activation_format="16x16" if mode == "w4a4" else None)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(2))
    q = lobcq_fx.quantize(identity, example_inputs=x, config=config)
    weight = q(torch.eye(K)).diagonal().mean()  # what the format makes of a 1
    torch.testing.assert_close(q(x), rounded_activation(x, config) * weight, rtol=1e-2, atol=1e-5)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="bits=3: pass a number of bits a scalar"):
        LobcqConfig(bits=3)
    with pytest.raises(ConfigError, match=r"activation_bits=5\.0 needs bits"):
        LobcqConfig(activation_bits=5.0)
    assert LobcqConfig.auto(4.6).bits == 4.6
    assert all(getattr(LobcqConfig.auto(), name) == value for name, value in RECIPES["best"].items())
    with pytest.raises(CalibrationError, match="budgets of bits need calibration_data"):
        lobcq_fx.quantize(Uneven(), config=LobcqConfig(bits=4.5), example_inputs=data()[0])
    with pytest.raises(CalibrationError, match="calibration_data is empty"):
        lobcq_fx.quantize(Uneven(), [], LobcqConfig(bits=4.5), example_inputs=data()[0])
    with pytest.raises(ConfigError, match="which only quantize"):
        fit_shared_codebooks(Uneven(), data(), FormatSpec(), LobcqConfig(bits=4.5))
    with pytest.raises(ConfigError, match="which only quantize"):
        LobcqQuantizer(LobcqConfig(bits=4.5), [{}]).validate_environment("dynamo")
