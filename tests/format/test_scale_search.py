"""Weights under the cheapest of some neighbouring scales: the oracle's bytes, and never a larger error."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.format import FormatSpec, decode, encode, sqnr_db, universal_codebooks
from tests.format.cases import KINDS, codebooks_of, matrix, same_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["8x64", "2x16", "1x128"])
def test_the_oracle_s_bytes(kind, name):
    spec = FormatSpec.from_name(name)
    same_bytes(torch.from_numpy(matrix(kind, 2, 140, seed=5)), spec, codebooks_of(3, spec.num_codebooks), search=True)


@pytest.mark.parametrize("name", ["8x64", "16x64", "2x128", "8x16"])
def test_errors_get_smaller(name):
    spec = FormatSpec.from_name(name)
    x, books = (
        torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)),
        universal_codebooks(spec.num_codebooks),
    )
    plain, searched = encode(x, spec, books), encode(x, spec, books, search_scales=True)
    errors = [(x - decode(one)).square().unflatten(1, (-1, spec.array_size)).sum(-1) for one in (plain, searched)]
    assert bool((errors[1] <= errors[0] * 1.1).all())  # compared on the grid of sixteenths
    assert sqnr_db(x, searched) > sqnr_db(x, plain) + 0.15
    assert searched.nbytes == plain.nbytes
