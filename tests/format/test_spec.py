"""FormatSpec: what may be asked for, names, and the count of every stored bit."""

from __future__ import annotations

import dataclasses

import pytest

from lobcq_fx.format import PAPER_CONFIGURATIONS, FormatSpec
from tests.format.cases import ALL_SPECS

PAPER_BITS = {
    "2x128": 4.1875,
    "2x64": 4.25,
    "4x64": 4.375,
    "8x128": 4.4375,
    "8x64": 4.5,
    "16x128": 4.5625,
    "16x64": 4.625,
    "16x32": 4.75,
}
"""Bits a scalar of the configurations that the paper evaluates (arXiv 2502.05376)."""


def test_paper_configurations():
    assert {name: spec.bits_per_scalar for name, spec in PAPER_CONFIGURATIONS.items()} == PAPER_BITS
    assert list(PAPER_CONFIGURATIONS) == list(PAPER_BITS)


def test_default_is_the_paper_s_four_and_a_half_bits():
    assert FormatSpec() == FormatSpec(num_codebooks=8, array_size=64)
    assert FormatSpec().bits_per_scalar == 4.5


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
def test_names_round_trip(spec):
    assert FormatSpec.from_name(spec.name) == spec
    assert spec.name == f"{spec.num_codebooks}x{spec.array_size}"


@pytest.mark.parametrize("name", ["", "8", "8x", "x64", "8x64x1", "8 x 64", "8X64", "LO-BCQ", "8x64 ", "-8x64"])
def test_malformed_names_are_refused_with_examples(name):
    with pytest.raises(ValueError, match=r"write '<codebooks>x<array size>', for example one of 2x128, .*8x64") as info:
        FormatSpec.from_name(name)
    assert repr(name) in str(info.value)


@pytest.mark.parametrize("number", [0, -1, 3, 6, 9, 32])
def test_number_of_codebooks(number):
    with pytest.raises(ValueError, match=rf"num_codebooks={number}: use one of \(1, 2, 4, 8, 16\)"):
        FormatSpec(num_codebooks=number)


@pytest.mark.parametrize("size", [0, -64, 8, 48, 63, 256])
def test_array_size(size):
    with pytest.raises(ValueError, match=rf"array_size={size}: use one of \(16, 32, 64, 128\)"):
        FormatSpec(array_size=size)


def test_well_formed_name_of_a_configuration_that_does_not_exist():
    with pytest.raises(ValueError, match="num_codebooks=3"):
        FormatSpec.from_name("3x64")
    with pytest.raises(ValueError, match="array_size=65"):
        FormatSpec.from_name("8x65")


def test_frozen_and_hashable():
    spec = FormatSpec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.array_size = 32
    assert len({FormatSpec(8, 64), FormatSpec(), FormatSpec(4, 64)}) == 2


@pytest.mark.parametrize(("number", "bits"), [(1, 0), (2, 1), (4, 2), (8, 3), (16, 4)])
def test_selector_bits(number, bits):
    assert FormatSpec(num_codebooks=number).selector_bits == bits


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
def test_unpadded_operands_store_exactly_bits_per_scalar(spec):
    """1024 columns: a whole number of arrays and of selector bytes in every configuration."""
    assert spec.stored_bits(7, 1024, tensor_scales=0) == 7 * 1024 * spec.bits_per_scalar
    assert spec.stored_bits(7, 1024) == 7 * 1024 * spec.bits_per_scalar + 32
    assert spec.stored_bits(7, 1024, tensor_scales=7) == 7 * 1024 * spec.bits_per_scalar + 7 * 32


@pytest.mark.parametrize(
    ("name", "columns", "codes", "selectors", "scales"),
    [
        ("8x64", 64, 32, 3, 1),  # 8 selectors of 3 bits: 3 bytes
        ("8x64", 1, 32, 3, 1),  # padded to 64
        ("8x64", 65, 64, 6, 2),
        ("8x16", 16, 8, 1, 1),  # 2 selectors of 3 bits: 6 bits, a byte
        ("8x16", 48, 24, 3, 3),  # 18 bits, 3 bytes
        ("2x16", 16, 8, 1, 1),
        ("16x128", 129, 128, 16, 2),
        ("1x32", 33, 32, 0, 2),
        ("8x64", 0, 0, 0, 0),
    ],
)
def test_bytes_of_a_row(name, columns, codes, selectors, scales):
    spec = FormatSpec.from_name(name)
    assert spec.code_bytes(columns) == codes
    assert spec.selector_bytes(columns) == selectors
    assert spec.num_arrays(columns) == scales
    assert spec.stored_bits(5, columns) == 8 * 5 * (codes + selectors + scales) + 32


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
def test_padding_is_the_least_that_fits(spec):
    for columns in range(0, 300):
        padded = spec.padded_columns(columns)
        assert padded % spec.array_size == 0
        assert columns <= padded < columns + spec.array_size
