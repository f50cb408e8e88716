"""Many more families, each by one call, a prompt and steps on its cache, saved and loaded; some wait for the night."""

from __future__ import annotations

import pytest
import torch

import lobcq_fx
from lobcq_fx.errors import LobcqError
from tests.families import CAUSAL_LMS, quantized_layers
from tests.more_families import DAILY, DISTINCT, FAMILIES, RECURRENT, REFUSED, agreement, linears_that_run
from tests.sweeps import sweep

IN_DEPTH = {config().model_type for config in CAUSAL_LMS.values()} | {"bert", "vit", "t5"} | RECURRENT.keys()
"""These go through tests of their own; `make families` runs all of `FAMILIES`."""


@pytest.mark.parametrize("name", sweep([name for name in DISTINCT if name not in IN_DEPTH], DAILY))
def test_a_family_computes_what_its_fake_quantized_original_does(name, tmp_path):
    family = FAMILIES[name]
    model = family.model()
    assert model.num_parameters() < 1_000_000  # the configuration took the sizes it was given
    q = family.quantized(model)
    linears = linears_that_run(family, model)
    assert set(quantized_layers(q)) <= linears <= {record.layer for record in q.inventory}
    found = agreement(family, model, q)
    # Rounding differs; where that moves a scalar to another code, one token's results change by part of the spread.
    assert found.median < 1e-5
    assert found.beyond < 0.1
    assert found.effect > 1e-3

    q.save_pretrained(tmp_path / "q")
    loaded, call = lobcq_fx.load(tmp_path / "q"), family.call(model)
    with torch.no_grad():
        assert torch.equal(family.results(loaded, call), family.results(q, call))


def test_at_least_sixty_families_are_tested():
    assert len(set(DISTINCT) | IN_DEPTH) >= 60


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"kimi_linear"}))  # whose loops take half a minute to trace
def test_what_is_not_supported_is_refused_by_name(name):
    model = REFUSED[name].model()
    with pytest.raises(LobcqError, match=type(model).__name__):
        REFUSED[name].quantized(model)
