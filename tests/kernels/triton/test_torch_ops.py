"""The ops' implementations against the default ones and float64 products. Without a GPU they are called directly."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lobcq_fx.ops
from lobcq_fx.errors import LobcqError
from lobcq_fx.format import EncodedStack, FormatSpec, encode, encode_stack, universal_codebooks
from lobcq_fx.kernels.triton import torch_ops
from lobcq_fx.kernels.triton.encode import encode_rows
from lobcq_fx.kernels.triton.encode_operand import encode_operand
from lobcq_fx.kernels.triton.lookup import Lookup
from lobcq_fx.kernels.triton.torch_ops import IMPLEMENTATIONS
from lobcq_fx.kernels.triton.weight_layout import CudaWeightLayout
from lobcq_fx.modules.packed_weight import PackedWeight
from lobcq_fx.ops import schemas
from lobcq_fx.ops.prologues import layer_norm, rms_norm, silu_mul
from tests.kernels.linears import OUTPUTS, STATIC, LaidOutLinears, values
from tests.kernels.triton.operands import DEVICE, assert_same_bits
from tests.kernels.violations import PREPACKED, STORED, assert_refused, prepacked_call, stored_call
from tests.sweeps import crossed

CONFIGS = ["1x16", "2x32", "8x64", "16x128"]


class Linears(LaidOutLinears):
    """Called directly: where there is no GPU, the dispatcher does not know the implementations."""

    def __init__(self, columns: int, spec: FormatSpec | None = None, outputs: tuple[int, ...] = OUTPUTS) -> None:
        super().__init__(CudaWeightLayout(), DEVICE, columns, spec, outputs)

    def w4a4(self, x: Tensor, static: Tensor | None = None) -> list[Tensor]:
        static = None if static is None else static.to(DEVICE)
        return IMPLEMENTATIONS[schemas.LINEAR_PREPACKED](x.to(DEVICE), self.tables, static, *self.rest, torch.float32)

    def w4a8(self, x: Tensor, static: Tensor | None = None) -> list[Tensor]:
        static = None if static is None else static.to(DEVICE)
        return IMPLEMENTATIONS[schemas.LINEAR_PREPACKED](x.to(DEVICE), None, static, *self.rest, torch.float32)

    def w4a16(self, x: Tensor) -> list[Tensor]:
        return IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_FLOAT_ACTIVATION](x.to(DEVICE), *self.rest)


@pytest.mark.parametrize(("name", "shape"), crossed(CONFIGS, [(64,), (3, 6, 70), (0, 64), (3, 0), (20, 0), (0, 0)]))
def test_prepacked(name: str, shape: tuple[int, ...]) -> None:
    """Few rows, and more than the kernel for few rows takes."""
    linears, x = Linears(shape[-1], FormatSpec.from_name(name)), values(*shape)
    linears.check(linears.w4a4(x), x, linears.fake_quantized(x))
    linears.check(linears.w4a8(x), x, linears.in_int8(x))
    linears.check(linears.w4a16(x), x, x.reshape(x.shape[:-1].numel(), shape[-1]))


@pytest.mark.parametrize("shape", [(3, 70), (20, 70), (0, 70), (3, 0)], ids=str)
def test_linears_without_outputs(shape: tuple[int, ...]) -> None:
    linears, x = Linears(shape[-1], outputs=(0, 17, 0)), values(*shape)
    linears.check(linears.w4a4(x), x, linears.fake_quantized(x))
    linears.check(linears.w4a16(x), x, x)
    none = Linears(shape[-1], outputs=())
    assert none.w4a4(x) == none.w4a16(x) == []


@pytest.mark.parametrize("rows", [3, 20])
def test_a_static_scale(rows: int) -> None:
    linears, x = Linears(100), values(rows, 100)
    linears.check(linears.w4a4(x, STATIC), x, linears.fake_quantized(x, STATIC))
    linears.check(linears.w4a8(x, STATIC), x, linears.in_int8(x, STATIC))


@pytest.mark.parametrize(("name", "shape"), crossed(CONFIGS, [(128,), (20, 128), (0, 128)]))
def test_rotated_activations(name: str, shape: tuple[int, ...]) -> None:
    linears, x = Linears(128, FormatSpec.from_name(name)), values(*shape).to(DEVICE)
    op, rotated = IMPLEMENTATIONS[schemas.LINEAR_PREPACKED], lobcq_fx.ops.rotate(x, linears.spec.array_size)
    for tables in (linears.tables, None):
        rest = (tables, None, *linears.rest, torch.float32)
        assert_all_equal(op(x, *rest, True), op(rotated, *rest))


def test_columns_that_fill_no_block_array_are_not_rotated() -> None:
    linears, x = Linears(70), values(3, 70).to(DEVICE)
    with pytest.raises(LobcqError, match="x has 70 columns: pass whole block arrays, multiples of 64"):
        IMPLEMENTATIONS[schemas.LINEAR_PREPACKED](x, linears.tables, None, *linears.rest, torch.float32, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    linears, x = Linears(200), values(5, 200).to(dtype)
    linears.biases = [bias.to(dtype) for bias in linears.biases]
    results = linears.w4a16(x)
    assert {out.dtype for out in results} == {dtype}
    linears.check(results, x, x.float())


@pytest.mark.parametrize(
    "x",
    [values(4, 3, 400)[..., 100:300], values(8, 200)[::2], values(200, 6).t(), values(4, 400)[:, ::2]],
    ids=["a slice", "every other row", "transposed", "strided within rows"],
)
def test_activations_as_they_lie(x: Tensor) -> None:
    linears = Linears(200)
    for actual, expected in zip(linears.w4a4(x), linears.w4a4(x.contiguous()), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(linears.w4a16(x), linears.w4a16(x.contiguous()), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("name", "shape"), crossed(CONFIGS, [(2, 3, 100), (0, 64), (3, 0)]))
def test_the_ops_on_stored_weights_equal_the_default_ones(name: str, shape: tuple[int, ...]) -> None:
    spec, x = FormatSpec.from_name(name), values(*shape).bfloat16()
    books, bias = universal_codebooks(spec.num_codebooks), values(20).bfloat16()
    w = encode(values(20, shape[-1]), spec, books)
    stored = (w.codes, w.selectors, w.scales, w.tensor_scale, books)
    on_device = tuple(part.to(DEVICE) for part in stored)
    for static in (None, STATIC):
        expected = lobcq_fx.ops.quantize_activation(x, books, spec.array_size, static)
        device_static = None if static is None else static.to(DEVICE)
        actual = torch_ops.quantize_activation(x.to(DEVICE), books.to(DEVICE), spec.array_size, device_static)
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other)
        tail = (shape[-1], spec.array_size, torch.float32)
        out = torch_ops.linear(*actual, books.to(DEVICE), *on_device, bias.to(DEVICE), *tail)
        assert_close(out, lobcq_fx.ops.linear(*expected, books, *stored, bias, *tail))
    expected = lobcq_fx.ops.quantize_activation_int8(x, spec.array_size)
    on_gpu, tail = [part.to(DEVICE) for part in expected], (shape[-1], spec.array_size, torch.float32)
    out = torch_ops.linear_int8_activation(*on_gpu, *on_device, bias.to(DEVICE), *tail)
    assert_close(out, lobcq_fx.ops.linear_int8_activation(*expected, *stored, bias, *tail))
    out = torch_ops.linear_float_activation(x.to(DEVICE), *on_device, bias.to(DEVICE), spec.array_size)
    assert_close(out, lobcq_fx.ops.linear_float_activation(x, *stored, bias, spec.array_size))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """On the CPU both are torch's products of equal bits; a GPU may add in another order."""
    tolerance = {"rtol": 0, "atol": 0} if DEVICE.type == "cpu" else {}
    torch.testing.assert_close(actual.cpu(), expected, **tolerance)


FUSED_SHAPES = [(64,), (3, 2, 70), (4, 5, 70), (0, 64), (3, 0)]
"""One row, few, more than the kernel for few rows takes, and none; no columns."""


def assert_all_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.is_contiguous()
        assert_same_bits(one, other)


@pytest.mark.parametrize(("shape", "way"), crossed(FUSED_SHAPES, ["w4a4", "w4a4, static", "w4a8"]))
def test_norms_on_the_way_in(shape: tuple[int, ...], way: str) -> None:
    linears, x = Linears(shape[-1]), values(*shape).bfloat16().to(DEVICE)
    tables = (None if way == "w4a8" else linears.tables, STATIC.to(DEVICE) if way == "w4a4, static" else None)
    weight, bias = values(shape[-1]).to(DEVICE), values(1, shape[-1])[0].bfloat16().to(DEVICE)
    residual = x.flip(-1) * 0.7

    def unfused(normed: Tensor) -> list[Tensor]:
        return IMPLEMENTATIONS[schemas.LINEAR_PREPACKED](normed, *tables, *linears.rest, torch.bfloat16)

    tail = (*tables, *linears.rest, torch.bfloat16)
    norm = (weight, 1e-5, 1.0, False)
    assert_all_equal(IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_RMS_NORM](x, *norm, *tail), unfused(rms_norm(x, *norm)))
    norm, total = (None, 1e-5, 0.0, True), x + residual
    added = IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_ADD_RMS_NORM](x, residual, *norm, *tail)
    assert_all_equal(added, [total, *unfused(rms_norm(total, *norm))])
    layer = (weight, bias, 1e-5)
    assert_all_equal(
        IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_LAYER_NORM](x, *layer, *tail), unfused(layer_norm(x, *layer))
    )


@pytest.mark.parametrize(("shape", "dtype"), crossed(FUSED_SHAPES, [torch.float32, torch.bfloat16]))
def test_residuals_on_the_way_out(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The second linear has none, the third's is not contiguous."""
    linears, x = Linears(shape[-1]), values(*shape).to(DEVICE)
    given = [values(*shape[:-1], n).to(DEVICE, dtype) for n in OUTPUTS]
    residuals = [given[0], torch.empty(0, device=DEVICE), given[2].repeat_interleave(2, -1)[..., ::2]]

    def added(results: list[Tensor]) -> list[Tensor]:
        return [results[0] + given[0], results[1], results[2] + given[2]]

    tables = (linears.tables, None)
    expected = IMPLEMENTATIONS[schemas.LINEAR_PREPACKED](x, *tables, *linears.rest, dtype)
    out = IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_RESIDUAL](x, *tables, *linears.rest, residuals, dtype)
    assert_all_equal(out, added(expected))

    x = x.to(dtype)
    expected = IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_FLOAT_ACTIVATION](x, *linears.rest)
    out = IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_FLOAT_ACTIVATION_RESIDUAL](x, *linears.rest, residuals)
    assert_all_equal(out, added(expected))

    gate = x * 2**-30  # so small that exp gives 1, whoever computes it
    expected = IMPLEMENTATIONS[schemas.LINEAR_PREPACKED](silu_mul(gate, x), *tables, *linears.rest, dtype)
    out = IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_SILU_MUL](gate, x, *tables, *linears.rest, residuals, dtype)
    assert_all_equal(out, added(expected))


def test_activations_of_two_strides_on_the_way_in() -> None:
    linears, wide = Linears(200), values(4, 3, 400).bfloat16().to(DEVICE)
    x, second = wide[..., 100:300], wide.flip(1)[..., ::2]
    tail = (linears.tables, None, *linears.rest)
    norm = (None, 1e-5, 0.0, True)
    assert_all_equal(
        IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_ADD_RMS_NORM](x, second, *norm, *tail, torch.float32),
        IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_ADD_RMS_NORM](
            x.contiguous(), second.contiguous(), *norm, *tail, torch.float32
        ),
    )
    none = [torch.empty(0, device=DEVICE)] * len(OUTPUTS)
    assert_all_equal(
        IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_SILU_MUL](x, second, *tail, none, torch.float32),
        IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_SILU_MUL](
            x.contiguous(), second.contiguous(), *tail, none, torch.float32
        ),
    )


def test_a_gradient_is_refused() -> None:
    linears, x = Linears(64), values(3, 64).requires_grad_()

    def normed(weight: Tensor) -> list[Tensor]:
        norm, tail = (weight[0].to(DEVICE), 1e-5, 0.0, True), (linears.tables, None, *linears.rest, torch.float32)
        return IMPLEMENTATIONS[schemas.LINEAR_PREPACKED_RMS_NORM](values(3, 64).to(DEVICE), *norm, *tail)

    for call in (linears.w4a4, linears.w4a16, normed):
        with pytest.raises(LobcqError, match="inference only"):
            call(x)
        with torch.no_grad():
            call(x)


def test_a_weight_module_holds_this_layout_and_saves_what_is_stored() -> None:
    """The layout of docs/extending.md's protocol: repacked, copied, pickled, saved and restored."""
    linears = Linears(200)
    module = PackedWeight(linears.encoded[0])
    stored = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.repack(CudaWeightLayout())
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(one, nn.Module)
        assert torch.equal(one.prepacked, linears.weights[0].cpu())
        state = one.state_dict()
        assert state.keys() == stored.keys()
        for name, tensor in stored.items():
            assert_same_bits(state[name], tensor)


def test_every_overload_has_an_implementation() -> None:
    packet = torch.ops.lobcq.linear_prepacked
    names = {getattr(packet, overload)._schema for overload in packet.overloads()}
    assert {f"{one.name}.{one.overload_name}".rstrip(".") for one in names} <= set(IMPLEMENTATIONS)


@pytest.mark.parametrize("op", PREPACKED)
def test_every_violation_of_a_prepacked_op_s_contract_is_refused(op: str) -> None:
    linears, x = Linears(200), values(2, 200).to(DEVICE)
    assert_refused(op, prepacked_call(op, x, linears.tables, linears.rest), IMPLEMENTATIONS[op], [])


@pytest.mark.parametrize("op", [op for op in STORED if op in IMPLEMENTATIONS])
def test_every_violation_of_a_stored_op_s_contract_is_refused(op: str) -> None:
    assert_refused(op, stored_call(op, DEVICE), IMPLEMENTATIONS[op], [])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_static_scale_that_no_host_looks_at_gives_nan(bad: float) -> None:
    """On a GPU its value is not checked, which would wait for it."""
    lookup, scale = Lookup.of(universal_codebooks(8).to(DEVICE)), torch.tensor(bad, device=DEVICE)
    x = values(3, 100).to(DEVICE)
    assert encode_operand(x, lookup, FormatSpec(), scale).row_scales.isnan().all()
    assert encode_rows(x, lookup, FormatSpec(), scale)[3].isnan().all()


GROUPED = schemas.GROUPED_LINEAR_PREPACKED
GROUPED_ENDS = torch.tensor([1, 1, 4, 6], dtype=torch.int32)
GROUPED_ROWS = torch.tensor([2, 0, 1, 0, 2, 1, 0])


def laid_out_stack(columns: int, spec: FormatSpec, outputs: int = 20) -> tuple[EncodedStack, Tensor, Tensor]:
    books = universal_codebooks(spec.num_codebooks)
    weights = torch.randn(4, outputs, columns, generator=torch.Generator().manual_seed(3)) * 0.05
    encoded = encode_stack(weights, spec, books)
    packed = PackedWeight(encoded).to(DEVICE)
    packed.repack(CudaWeightLayout())
    return encoded, packed.prepacked, CudaWeightLayout().tables(books.to(DEVICE))


@pytest.mark.parametrize(("name", "order"), crossed(["2x32", "8x64", "16x128"], ["as they are", "gathered"]))
def test_groups(name: str, order: str) -> None:
    """Against the ops on stored weights, which decode and leave the product to torch."""
    spec, rows = FormatSpec.from_name(name), GROUPED_ROWS if order == "gathered" else None
    encoded, stack, tables = laid_out_stack(200, spec)
    x = values(3 if rows is not None else 7, 200)
    stored = (encoded.codes, encoded.selectors, encoded.scales, encoded.tensor_scale, encoded.codebooks)
    given = (stack, encoded.tensor_scale.to(DEVICE), tables, GROUPED_ENDS.to(DEVICE))
    given += (None if rows is None else rows.to(DEVICE), 20, spec.array_size)
    tail = (GROUPED_ENDS, rows, 200, spec.array_size, torch.float32)
    a = lobcq_fx.ops.quantize_activation(x, encoded.codebooks, spec.array_size)
    expected = lobcq_fx.ops.grouped_linear(*a, encoded.codebooks, *stored, *tail)
    actual = IMPLEMENTATIONS[GROUPED](x.to(DEVICE), tables, None, *given, torch.float32)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)
    a = lobcq_fx.ops.quantize_activation_int8(x, spec.array_size)
    expected = lobcq_fx.ops.grouped_linear_int8_activation(*a, *stored, *tail)
    actual = IMPLEMENTATIONS[GROUPED](x.to(DEVICE), None, None, *given, torch.float32)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)
    expected = lobcq_fx.ops.grouped_linear_float_activation(x, *stored, GROUPED_ENDS, rows, spec.array_size)
    actual = IMPLEMENTATIONS[schemas.GROUPED_LINEAR_PREPACKED_FLOAT_ACTIVATION](x.to(DEVICE), *given)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_groups_of_one_size_and_rotated() -> None:
    encoded, stack, tables = laid_out_stack(128, FormatSpec())
    x = values(4, 3, 128).to(DEVICE)
    rest = (20, 64, torch.bfloat16, True)
    scales = encoded.tensor_scale.to(DEVICE)
    out = IMPLEMENTATIONS[GROUPED](x, tables, None, stack, scales, tables, None, None, *rest)
    assert out.shape == (4, 3, 20)
    ends = torch.tensor([3, 6, 9, 12], dtype=torch.int32, device=DEVICE)
    flat = lobcq_fx.ops.rotate(x.flatten(0, 1), 64)
    one = IMPLEMENTATIONS[GROUPED](flat, tables, None, stack, scales, tables, ends, None, 20, 64, torch.bfloat16)
    assert torch.equal(out.flatten(0, 1), one)


def test_the_bytes_of_a_stack_come_back() -> None:
    encoded, _, _ = laid_out_stack(200, FormatSpec(8, 128))
    packed = PackedWeight(encoded).to(DEVICE)
    packed.repack(CudaWeightLayout())
    packed.restore()
    for part in ("codes", "selectors", "scales", "tensor_scale"):
        assert_same_bits(getattr(packed, part), getattr(encoded, part))
