"""The package, and the oracle that judges it elsewhere, against bytes that neither produced."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode
from tests.format import oracle
from tests.format.cases import bits


def golden_file() -> Path:
    if "LOBCQ_TEST_DATA" not in os.environ:
        pytest.skip("LOBCQ_TEST_DATA is not set: the golden vectors stand beside the folder it names")
    path = Path(os.environ["LOBCQ_TEST_DATA"]).parent / "format" / "golden_vectors.npz"
    if not path.exists():
        pytest.skip(f"no golden vectors at {path}")
    return path


@pytest.fixture(scope="module")
def golden():
    with np.load(golden_file()) as data:
        fields = {name: data[name] for name in data.files}
    cases = sorted({name.split("/")[0] for name in fields})
    return {case: {k.split("/")[1]: v for k, v in fields.items() if k.startswith(case + "/")} for case in cases}


def test_package(golden):
    assert len(golden) == 48
    for name, case in golden.items():
        spec = FormatSpec(case["codebooks"].shape[0], int(case["array_size"]))
        x, codebooks = torch.from_numpy(case["x"]), torch.from_numpy(case["codebooks"])
        given_scale = torch.from_numpy(np.asarray(case["tensor_scale"]))
        for scale in (given_scale, None if given_scale.dim() == 0 else absmax_row_scale(x)):
            encoded = encode(x, spec, codebooks, scale)
            assert np.array_equal(encoded.tensor_scale.numpy(), case["tensor_scale"]), name
            assert np.array_equal(encoded.codes.numpy(), case["codes"]), name
            assert np.array_equal(encoded.selectors.numpy(), case["selectors"]), name
            assert np.array_equal(encoded.scales.view(torch.uint8).numpy(), case["scales"]), name
            assert bits(decode(encoded).numpy()) == bits(case["decoded"]), name


def test_oracle(golden):
    """The oracle is judged by the same bytes; small cases, it is slow."""
    small = {name: case for name, case in golden.items() if case["x"].size * len(case["codebooks"]) <= 5200}
    assert len(small) >= 24
    for name, case in small.items():
        codebooks = case["codebooks"].tolist()
        scales = case["tensor_scale"].reshape(-1).tolist() if case["tensor_scale"].ndim else None
        expected = oracle.encode(case["x"], int(case["array_size"]), codebooks, scales)
        assert np.array_equal(expected.tensor_scales, np.broadcast_to(case["tensor_scale"].ravel(), len(case["x"])))
        assert expected.codes == case["codes"].tolist(), name
        assert expected.selectors == case["selectors"].tolist(), name
        assert expected.scales == case["scales"].tolist(), name
        assert bits(expected.decoded) == bits(case["decoded"]), name
