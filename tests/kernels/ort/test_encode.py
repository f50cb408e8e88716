"""QuantizeActivation and QuantizeActivationInt8 in ONNX Runtime: every byte against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, Int8Activation, absmax_row_scale, encode, encode_int8, rotate
from tests.format.cases import ALL_SPECS, KINDS, matrix
from tests.kernels.cpu.operands import codebooks
from tests.kernels.ort.models import ENCODED, IN_INT8, Model, int8_quantize_model, quantize_model
from tests.sweeps import crossed


def assert_encodes(library: Path, x: Tensor, spec: FormatSpec, scale: Tensor | None = None, threads: int = 1) -> None:
    books, rows = codebooks(spec), x.flatten(end_dim=-2) if x.dim() > 1 else x[None]
    given = None if scale is None else scale.expand(rows.shape[0], 1)
    expected = encode(rows, spec, books, absmax_row_scale(rows) if given is None else given)
    assert_same(library, x, quantize_model(x.dtype, books, spec.array_size, scale), expected, ENCODED, threads)
    if spec.num_codebooks == 8:
        model = int8_quantize_model(x.dtype, spec.array_size, scale)
        assert_same(library, x, model, encode_int8(rows, spec.array_size, given), IN_INT8, threads)


def assert_same(
    library: Path, x: Tensor, model: Model, expected: Encoded | Int8Activation, names: tuple[str, ...], threads: int
) -> None:
    actual = model.session(library, threads).run(x=x)
    for name in names:
        part: Tensor = getattr(expected, name).contiguous()
        assert actual[name].dtype == part.dtype
        assert actual[name].shape == (*x.shape[:-1], part.shape[-1])
        assert torch.equal(actual[name].reshape(-1).view(torch.uint8), part.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize(
    ("spec", "shape"), crossed(ALL_SPECS, [(5, 1), (2, 3, 100), (1, 1, 2, 1500), (333,), (0, 64), (2, 0)])
)
def test_every_format(core_file: Path, spec: FormatSpec, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    assert_encodes(core_file, x, spec)
    assert_encodes(core_file, x, spec, torch.tensor(1e-4))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_values(core_file: Path, kind: str) -> None:
    assert_encodes(core_file, torch.from_numpy(matrix(kind, 7, 300, seed=3)), FormatSpec())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(core_file: Path, dtype: torch.dtype) -> None:
    assert_encodes(core_file, torch.randn(3, 5, 200).to(dtype), FormatSpec(8, 32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.01)], ids=["absmax", "static"])
def test_a_row_that_is_not_finite(core_file: Path, bad: float, scale: Tensor | None) -> None:
    x = torch.randn(2, 4, 300)
    x[1, 2, 77] = bad
    assert_encodes(core_file, x, FormatSpec(), scale)


@pytest.mark.parametrize("array_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation(core_file: Path, array_size: int, dtype: torch.dtype) -> None:
    model = Model({"x": dtype}, outputs=["y"])
    model.node("Rotate", ["x"], ["y"], array_size=array_size)
    session = model.session(core_file)
    for x in (torch.randn(2, 3, 1280), torch.randn(128), torch.empty(0, 256)):
        x = x.to(dtype)
        y = session.run(x=x)["y"]
        assert y.dtype == torch.float32
        assert torch.equal(y, rotate(x.float(), array_size))


def test_rotation_of_columns_that_fill_no_block_array_is_refused(core_file: Path) -> None:
    model = Model({"x": torch.float32}, outputs=["y"])
    model.node("Rotate", ["x"], ["y"], array_size=64)
    with pytest.raises(Exception, match=r"lobcq.Rotate 'Rotate_0': x has 100 columns, no multiple of array_size, 64"):
        model.session(core_file).run(x=torch.randn(3, 100))


def test_threads_change_nothing(core_file: Path) -> None:
    assert_encodes(core_file, torch.randn(257, 700), FormatSpec(), threads=2)


def test_codebooks_and_scale_may_be_computed(core_file: Path) -> None:
    spec, x, scale = FormatSpec(2, 16), torch.randn(3, 40), torch.tensor(0.003)
    model = quantize_model(torch.float32, codebooks(spec), 16, scale)
    model.inputs |= {name: tensor.dtype for name, tensor in model.constants.items()}
    given, model.constants = model.constants, {}
    actual = model.session(core_file).run(x=x, **given)
    expected = encode(x, spec, codebooks(spec), scale.expand(3, 1))
    assert torch.equal(actual["codes"], expected.codes)
    assert torch.equal(actual["selectors"], expected.selectors)
