"""What runs in the oldest ONNX Runtime that the package allows. `make oldest` runs this in it."""

from __future__ import annotations

import onnxruntime as ort
import pytest
import torch

from lobcq_fx.errors import ExportError
from lobcq_fx.export import OnnxCausalLM, export_onnx
from tests.families import quantized_causal_lm

FUSED_FROM, EIGHT_BITS_FROM = (1, 22), (1, 23)
RELEASE = tuple(int(part) for part in ort.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def q():
    return quantized_causal_lm("gpt-neox", static_cache=False)[1]


def test_an_export_without_fusions(exported_lm):
    exported = exported_lm("gpt-neox", fuse=False)
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([[5, 17, 3, 60, 8]])
    expected = exported.q.generate(ids, **settings)
    for use_library in (False, True):
        found = OnnxCausalLM(exported.folder, use_library=use_library).generate(ids, **settings)
        assert torch.equal(found, expected)


@pytest.mark.skipif(RELEASE >= FUSED_FROM, reason="this ONNX Runtime is new enough for fused graphs")
def test_a_fused_export_names_the_remedy(q, tmp_path):
    with pytest.raises(ExportError, match=r"refuses the exported model.*fuse=False"):
        export_onnx(q, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(RELEASE >= EIGHT_BITS_FROM, reason="this ONNX Runtime has an 8-bit MatMulNBits")
def test_matmulnbits_names_the_release_it_needs(q, tmp_path):
    with pytest.raises(ExportError, match=r"needs onnxruntime 1\.23"):
        export_onnx(q, tmp_path / "out", target="matmulnbits", fuse=False)
    assert not list(tmp_path.iterdir())
