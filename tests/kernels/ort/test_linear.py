"""The linears in ONNX Runtime, against float64 products of what the reference decodes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, decode, encode, encode_int8
from tests.format.cases import ALL_SPECS
from tests.kernels.cpu.operands import activation, codebooks, encode_rows
from tests.kernels.ort.models import ENCODED, Model, Session, float_model, int8_model, linear_model, weight_parts
from tests.kernels.products import assert_product
from tests.sweeps import crossed

SHAPES = [(1, 1, 1), (2, 37, 200), (31, 70, 777)]


def encoded_weight(spec: FormatSpec, outputs: int, columns: int, seed: int = 0) -> Encoded:
    values = torch.randn(outputs, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    return encode(values, spec, codebooks(spec))


@pytest.mark.parametrize(("spec", "shape"), crossed(ALL_SPECS, SHAPES))
def test_w4a4(core_file: Path, spec: FormatSpec, shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    w, x, bias = encoded_weight(spec, outputs, columns), activation(rows, columns), torch.randn(outputs)
    truth = decode(encode_rows(x, spec))
    assert_product(linear_model(w).session(core_file).run(x=x)["y"], truth, w)
    assert_product(linear_model(w, bias).session(core_file).run(x=x)["y"], truth, w, bias)


@pytest.mark.parametrize(("spec", "shape"), crossed(ALL_SPECS[-8:], SHAPES))
def test_w4a8(core_file: Path, spec: FormatSpec, shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    w, x, bias = encoded_weight(spec, outputs, columns), activation(rows, columns), torch.randn(outputs)
    truth = decode(encode_int8(x, spec.array_size))
    assert_product(int8_model(w, bias).session(core_file).run(x=x)["y"], truth, w, bias)


@pytest.mark.parametrize(("spec", "shape"), crossed(ALL_SPECS, SHAPES))
def test_w4a16(core_file: Path, spec: FormatSpec, shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    w, x, bias = encoded_weight(spec, outputs, columns), activation(rows, columns), torch.randn(outputs)
    assert_product(float_model(w).session(core_file).run(x=x)["y"], x, w)
    assert_product(float_model(w, bias).session(core_file).run(x=x)["y"], x, w, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(core_file: Path, dtype: torch.dtype) -> None:
    w, x = encoded_weight(FormatSpec(), 40, 200), torch.randn(7, 200).to(dtype)
    y = float_model(w, torch.ones(40), dtype).session(core_file).run(x=x)["y"]
    assert y.dtype == dtype
    assert_product(y, x.float(), w, torch.ones(40))


@pytest.mark.parametrize("make", [linear_model, float_model])
def test_leading_dimensions(core_file: Path, make: Callable[..., Model]) -> None:
    w = encoded_weight(FormatSpec(), 40, 200)
    session = make(w).session(core_file)
    for shape in ((2, 3, 200), (1, 1, 2, 200), (200,), (0, 200), (2, 0, 200)):
        x = torch.randn(shape)
        y = session.run(x=x)["y"]
        assert y.shape == (*shape[:-1], 40)
        assert torch.equal(y.reshape(-1, 40), session.run(x=x.reshape(-1, 200))["y"])


@pytest.mark.parametrize("make", [linear_model, float_model])
def test_a_row_that_is_not_finite_stays_alone(core_file: Path, make: Callable[..., Model]) -> None:
    session, x = make(encoded_weight(FormatSpec(), 40, 200)).session(core_file), torch.randn(4, 200)
    clean = session.run(x=x)["y"]
    x[2, 7] = float("nan")
    y = session.run(x=x)["y"]
    assert y.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("make", [linear_model, float_model])
@pytest.mark.parametrize("rows", [1, 65])
def test_threads_change_nothing(core_file: Path, make: Callable[..., Model], rows: int) -> None:
    model, x = make(encoded_weight(FormatSpec(), 1500, 1024)), torch.randn(rows, 1024)
    assert torch.equal(*(model.session(core_file, threads).run(x=x)["y"] for threads in (1, 2)))


def test_sessions_side_by_side(core_file: Path) -> None:
    """Each on a pool of its own: loops must not end up in another's."""
    weights = [encoded_weight(FormatSpec(), 700, 512, seed) for seed in range(4)]
    sessions = [linear_model(w).session(core_file, threads=2) for w in weights]
    x = torch.randn(33, 512)
    expected = [session.run(x=x)["y"] for session in sessions]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(sessions[i].run(x=x)["y"], expected[i]))

    # Two threads a session: one session may be called by several at once.
    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("make", [linear_model, float_model])
def test_a_weight_that_is_not_constant(core_file: Path, make: Callable[..., Model]) -> None:
    first, second = (encoded_weight(FormatSpec(), 40, 200, seed) for seed in (1, 2))
    x = torch.randn(3, 200)
    model = make(first, torch.ones(40))
    for name in [*weight_parts(first), "bias"]:
        model.inputs[name] = model.constants.pop(name).dtype
    session = model.session(core_file)
    for w in (first, second, first):
        y = session.run(x=x, **weight_parts(w), bias=torch.ones(40))["y"]
        assert torch.equal(y, make(w, torch.ones(40)).session(core_file).run(x=x)["y"])


def test_linears_share_an_encoded_activation(core_file: Path) -> None:
    spec, x = FormatSpec(), torch.randn(5, 200)
    narrow = encoded_weight(FormatSpec(2, 64), 24, 200)
    model = linear_model(encoded_weight(spec, 40, 200))
    parts = {f"other_{name}": part for name, part in weight_parts(narrow).items()}
    model.constants |= parts
    model.node("Linear", [*ENCODED, "codebooks", *parts], ["z"], array_size=64, in_features=200)
    model.outputs.append("z")
    out = model.session(core_file).run(x=x)
    truth = decode(encode_rows(x, spec))
    assert_product(out["y"], truth, encoded_weight(spec, 40, 200))
    assert_product(out["z"], truth, narrow)


def test_external_data_is_read_and_left_intact(core_file: Path, tmp_path: Path) -> None:
    """Mapped pages that were given back hold the same bytes for whoever reads them next."""
    w, x = encoded_weight(FormatSpec(), 512, 1024), torch.randn(3, 1024)
    model = linear_model(w)
    model.node("Identity", ["w_codes"], ["codes_again"])
    model.outputs.append("codes_again")
    path = tmp_path / "model.onnx"
    onnx.save_model(model.proto(), path, save_as_external_data=True, location="model.data", size_threshold=64)
    out = Session(str(path), core_file).run(x=x)
    assert torch.equal(out["codes_again"], w.codes)
    assert torch.equal(out["y"], linear_model(w).session(core_file).run(x=x)["y"])


def test_the_whole_graph_may_be_constant(core_file: Path) -> None:
    """Then ONNX Runtime calls the kernels while it builds the session, to fold them away."""
    w, x = encoded_weight(FormatSpec(), 40, 200), activation(3, 200)
    model: Model = linear_model(w)
    del model.inputs["x"]
    model.constants["x"] = x
    y: Tensor = model.session(core_file).run()["y"]
    assert_product(y, decode(encode_rows(x, FormatSpec())), w)
