"""What the op library refuses: by a message that names the input, never by a crash."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, encode
from tests.kernels.cpu.operands import codebooks
from tests.kernels.ort.models import ENCODED, Model, float_model, linear_model, quantize_model, weight_parts


def weight(columns: int = 200) -> Encoded:
    spec = FormatSpec()
    return encode(torch.randn(40, columns, generator=torch.Generator().manual_seed(0)), spec, codebooks(spec))


def changed(part: Tensor, byte: int) -> Tensor:
    part = part.clone()
    part.view(torch.uint8)[17, -1] = byte
    return part


def refuses(model: Model, library: Path, *words: str, **inputs: Tensor) -> None:
    """In the making of the session, or in its first run."""
    with pytest.raises(Exception) as error:  # noqa: PT011  (onnxruntime has a class for each status code)
        model.session(library).run(**inputs)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        ("w_codes", torch.zeros(40, 96, dtype=torch.uint8), "w_selectors has the shape [40, 12], not [40, 9]"),
        ("w_codes", torch.zeros(40, 100, dtype=torch.uint8), "of 200 scalars, which are no multiple of array_size"),
        ("w_codes", torch.zeros(40, 2, 64, dtype=torch.uint8), "not [N, Kp/2]"),
        ("w_codes", torch.zeros((), dtype=torch.uint8), "not [N, Kp/2]"),
        ("w_selectors", torch.zeros(40, 11, dtype=torch.uint8), "w_selectors has the shape [40, 11], not [40, 12]"),
        ("w_scales", torch.zeros(41, 4).to(torch.float8_e4m3fn), "w_scales has the shape [41, 4], not [40, 4]"),
        ("w_scales", changed(weight().scales, 0x7F), "corrupt"),
        ("w_scales", changed(weight().scales, 0x80), "corrupt"),
        ("w_tensor_scale", torch.ones(40), "w_tensor_scale has the shape [40], not []"),
        ("w_codebooks", torch.zeros(3, 16, dtype=torch.int8), "w_codebooks: num_codebooks must be 1, 2, 4, 8 or 16"),
        ("w_codebooks", torch.zeros(8, 15, dtype=torch.int8), "w_codebooks has the shape [8, 15]"),
        ("w_codebooks", torch.full((8, 16), 32, dtype=torch.int8), "w_codebooks: codebook entries must lie in"),
        ("bias", torch.ones(41), "bias has the shape [41], not [40]"),
        ("bias", torch.ones(()), "bias has the shape [], not [40]"),
    ],
)
@pytest.mark.parametrize("make", [linear_model, float_model])
def test_a_wrong_weight(core_file: Path, make, name: str, part: Tensor, words: str, constant: bool) -> None:
    model, inputs = make(weight(), torch.ones(40)), {"x": torch.randn(3, 200)}
    model.constants[name] = part
    if not constant:
        model.inputs[name] = part.dtype
        inputs[name] = model.constants.pop(name)
    refuses(model, core_file, "lobcq.Linear", "_0'", words, **inputs)


@pytest.mark.parametrize("make", [linear_model, float_model])
@pytest.mark.parametrize("columns", [192, 257])
def test_a_weight_of_other_columns(core_file: Path, make, columns: int) -> None:
    refuses(make(weight(columns)), core_file, x=torch.randn(3, 200))


@pytest.mark.parametrize("columns", [1, 192, 257])
def test_a_weight_of_other_columns_says_so(core_file: Path, columns: int) -> None:
    refuses(float_model(weight()), core_file, "the weight has rows of 256 scalars", x=torch.randn(3, columns))


@pytest.mark.parametrize("name", ENCODED)
def test_a_wrong_activation(core_file: Path, name: str) -> None:
    w = weight()
    parts = {"codes": w.codes, "selectors": w.selectors, "scales": w.scales, "tensor_scale": torch.ones(40, 1)}
    model = Model({n: part.dtype for n, part in parts.items()}, {"codebooks": w.codebooks} | weight_parts(w))
    model.node("Linear", [*model.inputs, *model.constants], ["y"], array_size=64, in_features=200)
    model.outputs.append("y")
    assert model.session(core_file).run(**parts)["y"].shape == (40, 40)
    short = parts | {name: parts[name][:39]}
    # The others' rows are counted against those of the codes.
    refuses(model, core_file, "has the shape [40" if name == "codes" else f"{name} has the shape [39", **short)
    refuses(model, core_file, "has no dimension" if name == "codes" else f"{name} has the shape []",
            **(parts | {name: parts[name].flatten()[0]}))  # fmt: skip


def test_activation_bytes_that_no_encoder_writes_are_harmless(core_file: Path) -> None:
    w, generator = weight(), torch.Generator().manual_seed(3)
    parts = {"codes": w.codes, "selectors": w.selectors, "scales": w.scales, "tensor_scale": torch.ones(40, 1)}
    noise = {n: torch.randint(0, 256, p.shape, dtype=torch.uint8, generator=generator) for n, p in parts.items()}
    noise |= {"scales": noise["scales"].view(torch.float8_e4m3fn), "tensor_scale": parts["tensor_scale"]}
    model = Model({n: part.dtype for n, part in noise.items()}, {"codebooks": w.codebooks} | weight_parts(w))
    model.node("Linear", [*model.inputs, *model.constants], ["y"], array_size=64, in_features=200)
    model.outputs.append("y")
    assert model.session(core_file).run(**noise)["y"].shape == (40, 40)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_static_scale_out_of_range(core_file: Path, scale: float) -> None:
    model = quantize_model(torch.float32, codebooks(FormatSpec()), 64, torch.tensor(scale))
    refuses(model, core_file, "static_scale is", "it must be positive and finite", x=torch.randn(3, 200))


def test_an_activation_without_dimensions(core_file: Path) -> None:
    refuses(linear_model(weight()), core_file, "x has no dimension", x=torch.tensor(1.0))
    refuses(float_model(weight()), core_file, "x has no dimension", x=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"in_features": 200}, "the integer attribute array_size is missing"),
        ({"array_size": 64}, "the integer attribute in_features is missing"),
        ({"array_size": 48, "in_features": 200}, "array_size is 48, not 16, 32, 64 or 128"),
        ({"array_size": 64, "in_features": -1}, "in_features is -1"),
        ({"array_size": 64, "in_features": 2**62}, "the activation is too large"),
    ],
)
def test_attributes(core_file: Path, attributes: dict[str, int], words: str) -> None:
    model = linear_model(weight())
    inputs = list(model.nodes.pop().input)
    model.node("Linear", inputs, ["y"], **attributes)
    refuses(model, core_file, "lobcq.Linear 'Linear_0'", words, x=torch.randn(3, 200))


@pytest.mark.parametrize(
    ("name", "part"),
    [("x", torch.zeros(3, 200, dtype=torch.int64)), ("w_scales", torch.zeros(40, 4)), ("bias", torch.zeros(40).half())],
)
def test_a_type_that_is_not_the_ops(core_file: Path, name: str, part: Tensor) -> None:
    model = float_model(weight(), torch.ones(40))
    model.inputs.pop(name, None)
    model.constants[name] = part
    model.inputs = {"x": torch.float32} if name != "x" else {}
    with pytest.raises(Exception, match=r"[Tt]ype"):
        model.session(core_file)


class _ApiBase(ctypes.Structure):
    GetApi = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    GetVersionString = ctypes.CFUNCTYPE(ctypes.c_void_p)
    _fields_ = (("get_api", GetApi), ("get_version_string", GetVersionString))


def test_an_onnxruntime_that_is_too_old(core_file: Path) -> None:
    """A made-up one, which offers the first version of its interface alone."""
    said: list[bytes] = []
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)(
        lambda _, message: said.append(message) or 1234
    )
    api = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p).value)
    get_api = _ApiBase.GetApi(lambda version: ctypes.addressof(api) if version == 1 else None)
    version = ctypes.create_string_buffer(b"1.16.3")
    base = _ApiBase(get_api, _ApiBase.GetVersionString(lambda: ctypes.addressof(version)))
    library = ctypes.CDLL(str(core_file))
    library.RegisterCustomOps.restype = ctypes.c_void_p
    assert library.RegisterCustomOps(None, ctypes.byref(base)) == 1234
    assert said == [b"lobcq: this is ONNX Runtime 1.16.3, the op library needs 1.17 or later"]


def test_an_instruction_set_that_the_cpu_lacks(
    core_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOBCQ_CPU_ISA", "avx3")
    copy = shutil.copy(core_file, tmp_path / "liblobcq.so")
    with pytest.raises(Exception, match="lobcq: LOBCQ_CPU_ISA is 'avx3', this CPU runs: ") as error:
        onnxruntime.SessionOptions().register_custom_ops_library(str(copy))
    assert type(error.value).__module__.startswith("onnxruntime")


def test_a_library_serves_any_number_of_options(core_file: Path) -> None:
    for _ in range(3):
        onnxruntime.SessionOptions().register_custom_ops_library(str(core_file))
