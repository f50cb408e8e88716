"""The grouped linears in ONNX Runtime with the op library: one linear for each group, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import EncodedStack, FormatSpec, encode_stack
from lobcq_fx.format.stacked import group_bounds
from tests.kernels.cpu.operands import activation, codebooks
from tests.kernels.ort.models import (
    ENCODED,
    IN_INT8,
    Model,
    float_model,
    int8_model,
    int8_quantize_model,
    linear_model,
    quantize_model,
    weight_parts,
)

COLUMNS, OUTPUTS, EXPERTS = 200, 40, 4
ROWS = torch.tensor([5, 0, 0, 3, 2, 1, 5, 5, 4])
ENDS = ([2, 2, 5, 9], [0, 0, 0, 0], [9, 3, -7, 2**31 - 1], [1, 2, 3, 4])
OPS = {"w4a4": "GroupedLinear", "w4a8": "GroupedLinearInt8Activation", "w4a16": "GroupedLinearFloatActivation"}
LINEARS = {"w4a4": linear_model, "w4a8": int8_model, "w4a16": float_model}


def stack_of(spec: FormatSpec) -> EncodedStack:
    weights = torch.randn(EXPERTS, OUTPUTS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return encode_stack(weights * torch.logspace(-1, 1, EXPERTS).view(-1, 1, 1), spec, codebooks(spec))


def grouped_model(mode: str, stack: EncodedStack, constant: bool = True, **changes: Tensor) -> Model:
    """x, ends, rows -> y; the weights are inputs too where they are not constant."""
    spec, size = stack.spec, {"in_features": stack.columns}
    if mode == "w4a4":
        model, parts = quantize_model(torch.float32, stack.codebooks, spec.array_size), [*ENCODED, "codebooks"]
        size["activation_array_size"] = spec.array_size
    elif mode == "w4a8":
        model, parts = int8_quantize_model(torch.float32, spec.array_size), [*IN_INT8]
    else:
        model, parts, size = Model({"x": torch.float32}), ["x"], {}
    model.outputs = ["y"]
    model.inputs |= {"ends": torch.int32, "rows": torch.int64}
    weight = weight_parts(stack) | changes
    if constant:
        model.constants |= weight
    else:
        model.inputs |= {name: tensor.dtype for name, tensor in weight.items()}
    model.node(OPS[mode], [*parts, *weight, "ends", "rows"], ["y"], array_size=spec.array_size, **size)
    return model


@pytest.mark.parametrize("mode", OPS)
@pytest.mark.parametrize("constant", [True, False])
def test_each_group_is_a_linear_of_its_rows(core_file: Path, mode: str, constant: bool) -> None:
    spec = FormatSpec()
    stack, x = stack_of(spec), activation(6, COLUMNS)
    session = grouped_model(mode, stack, constant).session(core_file)
    linears = [LINEARS[mode](stack.matrix(index)).session(core_file) for index in range(EXPERTS)]
    given = {} if constant else weight_parts(stack)
    for ends in ENDS:
        y = session.run(x=x, ends=torch.tensor(ends, dtype=torch.int32), rows=ROWS, **given)["y"]
        expected = torch.zeros(len(ROWS), OUTPUTS)
        for index, (start, stop) in enumerate(group_bounds(ends, len(ROWS))):
            if stop > start:
                expected[start:stop] = linears[index].run(x=x[ROWS[start:stop]])["y"]
        assert torch.equal(y, expected)


@pytest.mark.parametrize("mode", OPS)
def test_no_rows(core_file: Path, mode: str) -> None:
    session = grouped_model(mode, stack_of(FormatSpec(2, 32))).session(core_file)
    y = session.run(x=activation(6, COLUMNS), ends=torch.zeros(4, dtype=torch.int32), rows=ROWS[:0])["y"]
    assert y.shape == (0, OUTPUTS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": torch.tensor([0, 6])}, "rows reach from 0 to 6: the activation has rows 0 to 5"),
        ({"rows": torch.tensor([-1])}, "rows reach from -1 to -1"),
        ({"rows": torch.tensor([[0]])}, r"rows has the shape \[1, 1\]"),
        ({"ends": torch.zeros(3, dtype=torch.int32)}, r"ends has the shape \[3\]"),
        ({"x": torch.ones(2, 3, COLUMNS)}, r"leading dimensions \[2, 3\], not \[T\]"),
        ({"x": torch.ones(6, COLUMNS + 64)}, "has the shape|the weight has rows of 256 scalars"),
    ],
)
def test_calls_that_are_refused(core_file: Path, changes: dict[str, Tensor], says: str) -> None:
    call = {"x": activation(6, COLUMNS), "ends": torch.tensor(ENDS[0], dtype=torch.int32), "rows": ROWS}
    for mode in OPS:
        session = grouped_model(mode, stack_of(FormatSpec())).session(core_file)
        with pytest.raises(Exception, match=says):
            session.run(**call | changes)
        assert session.run(**call)["y"].shape == (len(ROWS), OUTPUTS)  # and nothing is broken afterwards


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("w_codes", lambda part: part[0], r"not \[E, N, Kp/2\]"),
        ("w_codes", lambda part: part[:3], r"w_selectors has the shape \[4, "),
        ("w_scales", lambda part: part[0], "w_scales has the shape"),
        ("w_scales", lambda part: part[:, :-1], "w_scales has the shape"),
        ("w_selectors", lambda part: part[:, :, :-1], "w_selectors has the shape"),
        ("w_scales", lambda part: torch.full_like(part.view(torch.uint8), 0x7F).view(part.dtype), "no encoder writes"),
    ],
)
def test_weights_that_are_refused(core_file: Path, name: str, change, says: str) -> None:
    stack = stack_of(FormatSpec())
    changed = change(weight_parts(stack)[name].view(torch.uint8)).contiguous()
    changed = changed.view(weight_parts(stack)[name].dtype)
    with pytest.raises(Exception, match=says):
        grouped_model("w4a4", stack, **{name: changed}).session(core_file)
