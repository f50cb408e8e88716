"""The public names, and how long they take to import."""

from __future__ import annotations

import subprocess
import sys

import lobcq_fx
from lobcq_fx import errors

PUBLIC = {
    "FormatSpec",
    "LobcqCache",
    "LobcqConfig",
    "LobcqError",
    "LobcqQuantizationConfig",
    "QuantizedModel",
    "default_model_path",
    "export_onnx",
    "load",
    "optimize",
    "quantize",
    "quantize_folder",
}


def test_the_public_names_are_these_and_all_are_documented():
    assert set(lobcq_fx.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(lobcq_fx, name).__doc__


def test_every_error_can_be_caught_as_one():
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(kinds) >= 6
    assert all(issubclass(kind, lobcq_fx.LobcqError) for kind in kinds)


def test_submodules_do_not_shadow_the_functions():
    code = (
        "import lobcq_fx.pipeline, lobcq_fx.loading, lobcq_fx\n"
        "assert callable(lobcq_fx.quantize) and callable(lobcq_fx.load)\n"
        "assert 'quantize' in dir(lobcq_fx)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, lobcq_fx; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_quantized_model_is_loaded_by_a_fresh_process(tmp_path):
    import torch
    from torch import nn

    torch.manual_seed(0)
    x = torch.randn(3, 64)
    q = lobcq_fx.quantize(nn.Sequential(nn.Linear(64, 64)), example_inputs=x)
    q.save_pretrained(tmp_path / "q")
    torch.save((x, q(x)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, lobcq_fx\n"
        "x, y = torch.load(sys.argv[2])\n"
        "assert torch.equal(lobcq_fx.load(sys.argv[1])(x), y)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "q"), str(tmp_path / "expected.pt")], check=True)
