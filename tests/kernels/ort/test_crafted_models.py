"""Models that somebody made wrong on purpose: every input of every op in every other size and type, whole and cut off.

ONNX Runtime refuses, or the result is that of the intact model; the sanitized build sees that nothing else is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, encode
from tests.kernels.cpu.operands import codebooks
from tests.kernels.ort.models import ELEMENT_TYPES, Model, Session, float_model, linear_model, quantize_model

X = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))


def quantize() -> Model:
    return quantize_model(torch.float32, codebooks(FormatSpec()), 64, torch.tensor(1e-3))


def linear() -> Model:
    return linear_model(weight(), torch.ones(40))


def float_activation() -> Model:
    return float_model(weight(), torch.ones(40))


def weight():
    return encode(
        torch.randn(40, 200, generator=torch.Generator().manual_seed(0)), FormatSpec(), codebooks(FormatSpec())
    )


MODELS = (quantize, linear, float_activation)


def bits(tensor: Tensor) -> Tensor:
    """As integers, which every operation of torch takes."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def others(part: Tensor) -> Iterator[Tensor]:
    """What a tensor is not: other types, ranks and sizes."""
    for dtype in ELEMENT_TYPES:
        if dtype != part.dtype:
            yield torch.zeros(part.shape, dtype=torch.float32).to(dtype)
    yield part.unsqueeze(0)
    yield part.unsqueeze(-1)
    if not part.dim():
        yield part.expand(2).clone()
        yield part.new_empty(0)
        return
    yield bits(part).flatten()[0].view(part.dtype)
    yield bits(part)[0].view(part.dtype)
    for dimension, size in enumerate(part.shape):
        more = torch.cat((bits(part),) * 17, dimension)
        for other in (size + 1, size - 1, size + 16, 0):
            yield more.narrow(dimension, 0, other).clone().view(part.dtype)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(bits(one[name]), bits(other[name])) for name in other)


def refused(make: Callable[[], Session], inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether ONNX Runtime says no, when the session is made or in its first run; or nothing is wrong."""
    try:
        return same(make().run(**inputs), expected)
    except Exception as error:  # onnxruntime has a class for each status code
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return True


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("make", MODELS)
def test_inputs_of_other_types_and_sizes(core_file: Path, make: Callable[[], Model], constant: bool) -> None:
    expected = make().session(core_file).run(x=X)
    for name, part in make().constants.items():
        for other in others(part):
            model, inputs = make(), {"x": X}
            model.constants[name] = other
            if not constant:
                model.inputs[name] = other.dtype
                inputs[name] = model.constants.pop(name)
            assert refused(lambda model=model: model.session(core_file), inputs, expected), (
                name,
                other.dtype,
                other.shape,
            )


@pytest.mark.parametrize("make", MODELS)
def test_activations_of_other_types_and_sizes(core_file: Path, make: Callable[[], Model]) -> None:
    session = make().session(core_file)
    for other in (X[:, :191], X[:, :1], X[:, :0], torch.cat((X, X), 1), X[0, 0], X.long(), X.half(), X.to(torch.uint8)):
        if make is quantize and other.dtype == torch.float32 and other.dim():
            assert len(session.run(x=other)["codes"]) == 3
        else:
            assert refused(lambda: session, {"x": other}, {}) or other.shape == X.shape


def lies(proto: onnx.TensorProto, folder: Path) -> Iterator[onnx.TensorProto]:
    """Initializers whose bytes are not as many as they say, or elsewhere."""
    raw = proto.raw_data
    for data in (raw[:-1], raw[: len(raw) // 2], b"", raw + b"\0"):
        yield changed(proto, raw_data=data)
    for dims in ([2**31, 2**31], [2**62], [-1], [*proto.dims, 2**40], [2**32, 2**32, 0]):
        lie = changed(proto)
        lie.dims[:] = dims
        yield lie
    for offset, length in ((0, len(raw) + 4096), (2**40, len(raw)), (-64, len(raw)), (len(raw) // 2, len(raw))):
        (folder / "data").write_bytes(raw)
        external = changed(proto, raw_data=b"")
        external.ClearField("raw_data")
        external.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "data"), ("offset", offset), ("length", length)):
            external.external_data.add(key=key, value=str(value))
        yield external


def changed(proto: onnx.TensorProto, **fields: bytes) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(proto)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


@pytest.mark.parametrize("make", MODELS)
def test_initializers_that_lie_about_their_bytes(core_file: Path, tmp_path: Path, make: Callable[[], Model]) -> None:
    expected = make().session(core_file).run(x=X)
    proto = make().proto()
    for index, intact in enumerate(list(proto.graph.initializer)):
        for lie in lies(intact, tmp_path):
            crafted = onnx.ModelProto()
            crafted.CopyFrom(proto)
            crafted.graph.initializer[index].CopyFrom(lie)
            path = tmp_path / "model.onnx"
            path.write_bytes(crafted.SerializeToString())
            assert refused(lambda path=path: Session(str(path), core_file), {"x": X}, expected), (intact.name, lie.dims)


def test_sizes_that_overflow_behind_a_dimension_of_zero(core_file: Path) -> None:
    """A tensor of no elements may claim any others: their product is more than 64 bits hold."""
    for make in (quantize, float_activation):
        model = make()
        x = model.nodes[-1].input[0]
        model.inputs = {"shape": torch.int64}
        model.nodes.insert(0, onnx.helper.make_node("ConstantOfShape", ["shape"], [x]))
        for shape in ([2**32, 2**32, 0], [2**31, 2**31, 2, 0], [2**62, 4, 0]):
            assert refused(lambda model=model: model.session(core_file), {"shape": torch.tensor(shape)}, {})
