"""Every way to break an operand's contract, made from the table; and a valid call of every op to break it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.errors import OperandError
from lobcq_fx.format import FormatSpec, encode, encode_int8, encode_stack, universal_codebooks
from lobcq_fx.ops import schemas
from lobcq_fx.ops.contracts import FLOATS, OPERANDS, Operand
from lobcq_fx.ops.operand_checks import Arguments

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int8,
    torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def torch_op(op: str) -> Any:
    """What dispatches an op by its name."""
    packet, _, overload = op.removeprefix("lobcq::").partition(".")
    return getattr(getattr(torch.ops.lobcq, packet), overload or "default")


def violations(op: str, operand: Operand, valid: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What `operand` must not be, each with what is wrong with it; `valid` is what it may be."""
    none = operand.or_empty and valid.shape == (0,)
    allowed = set(FLOATS) if none else set(operand.dtypes) if operand.like is None else {valid.dtype}
    for dtype in DTYPES:
        if dtype not in allowed:
            yield f"{dtype}", valid.to(dtype)
    if len(OPERANDS[op]) > 1:  # alone, it may be on any
        yield "on another device", valid.to("meta")
    if valid.numel():
        yield "no storage", _shrunk(valid, 0)
        yield "a storage that is too short", _shrunk(valid, valid.untyped_storage().nbytes() - 1)
    if none:
        return
    first = operand is OPERANDS[op][0]
    if not first or ... not in operand.shape:
        yield "a dimension more", valid.unsqueeze(0)
    if valid.dim():
        yield "no dimension", valid.new_empty(())
        if not first and valid.shape[0] and not (operand.or_empty and valid.shape[1:] == (0,)):  # which stands for none
            yield "a dimension less", valid[0]
        yield from _other_sizes(operand, valid, first)
    else:
        yield "two numbers", torch.stack((valid, valid))
        yield "no number", valid.new_empty(0)
    if operand.contiguous and valid.numel() > 1:
        yield "gaps", torch.stack((valid, valid), dim=-1)[..., 0]
        yield "one element repeated", valid.flatten()[:1].expand_as(valid)
    for bad in (0.0, -1.0, float("nan"), float("inf"), -0.0) if operand.positive else ():
        yield f"{bad}", torch.full_like(valid, bad)


def _other_sizes(operand: Operand, valid: Tensor, first: bool) -> Iterator[tuple[str, Tensor]]:
    free = {"B", "H", "T", "D", "K", "N", "E"} if first or operand.name == "w_codes" else {"P", "S"}
    for place, size in enumerate(operand.shape, valid.dim() - len(operand.shape)):
        if size in free or (size is ... and first):
            continue
        dimension = 0 if size is ... else place
        if valid.shape[dimension] == 0:
            continue
        bits = valid.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[valid.element_size()])
        more = torch.cat((bits, bits), dimension).view(valid.dtype)  # not every dtype can be concatenated
        for delta in (1,) if operand.or_empty and valid.shape == (1,) else (1, -1):
            yield f"dimension {dimension} {delta:+}", more.narrow(dimension, 0, valid.shape[dimension] + delta).clone()
        if not (operand.or_empty and valid.dim() == 1):
            yield f"dimension {dimension} empty", valid.narrow(dimension, 0, 0).clone()


def _shrunk(tensor: Tensor, nbytes: int) -> Tensor:
    """A tensor that says its size and has less memory."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    tensor.untyped_storage().resize_(min(nbytes, tensor.numel() * tensor.element_size() - 1))
    return tensor


def broken_calls(op: str, given: Arguments) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Calls with one argument broken: its name, what is wrong with it, and the arguments."""
    for operand in OPERANDS[op]:
        value = given.get(operand.name)
        if isinstance(value, list):
            yield operand.name, "one less", {**given, operand.name: value[1:]}
            yield operand.name, "one more", {**given, operand.name: [*value, value[0]]}
            for what, broken in violations(op, operand, value[0]):
                yield operand.name, what, {**given, operand.name: [broken, *value[1:]]}
        elif value is not None:
            for what, broken in violations(op, operand, value):
                yield operand.name, what, {**given, operand.name: broken}
    for name, value in broken_numbers(given):
        yield name, f"{value}", {**given, name: value}


def broken_numbers(given: Arguments) -> Iterator[tuple[str, Any]]:
    """Arguments that are no tensors, and what they must not be."""
    sizes = (0, 8, 48, 256, -64, 2**32 + 64, -(2**32) + 64, 2**63 - 1, -(2**63))
    for name in ("array_size", "key_array_size", "value_array_size"):
        yield from ((name, size) for size in sizes if name in given)
    if "dtype" in given:
        yield from (("dtype", dtype) for dtype in (torch.float64, torch.int32, torch.uint8, torch.float8_e4m3fn))
    if "in_features" in given:
        yield from (("in_features", columns) for columns in (-1, 0, 192, 257, 2**62))
    for name in ("heads", "width", "value_width"):
        yield from ((name, size) for size in (-1, 0, 65, 2**62) if name in given)
    if "half" in given:
        yield from (("half", columns) for columns in (-1, 51, 2**62, -(2**63)))
    if "normalized" in given:
        yield from (("normalized", dtype) for dtype in (torch.float64, torch.int32, torch.uint8))
    if isinstance(given.get("out_features"), int):
        first = given["out_features"]
        for n in {-1, 0, first - 1, first + 1, first + 16, 2**31 + 1, 2**62, -(2**63)}:
            yield "out_features", n
    elif "out_features" in given:
        first, *rest = given["out_features"]
        for n in {-1, 0, first - 1, first + 1, first + 16, 2**31 + 1, 2**62, -(2**63)} - {first}:
            yield "out_features", [n, *rest]
        yield "out_features", rest


PREPACKED = [name for name in OPERANDS if name.startswith(schemas.LINEAR_PREPACKED)]
GROUPED_PREPACKED = [name for name in OPERANDS if name.startswith(schemas.GROUPED_LINEAR_PREPACKED)]
STORED = [name for name in OPERANDS if name not in (*PREPACKED, *GROUPED_PREPACKED)]


_NUMBERS = ("array_size", "key_array_size", "value_array_size", "heads", "width", "value_width")
UNNAMED = {"codebooks", "w_codebooks", "w_codes", "in_features", "out_features", *_NUMBERS}
"""Where these are wrong, whatever else depends on them may be what is named."""


SCANS = (schemas.SELECTIVE_SCAN, schemas.CHUNK_SCAN, schemas.GATED_DELTA_RULE)


def _size_of(size: str, sizes: dict[str, int], values: dict[str, Any]) -> int:
    other, _, dimension = size.partition(".")
    return int(values[other].shape[int(dimension)]) if dimension else sizes[size]


def assert_refused(op: str, given: Arguments, run: Callable[..., object], errors: Sequence[type[Exception]]) -> None:
    """Each broken call of an op is refused by one of the errors, which names the argument."""
    first, accepted = OPERANDS[op][0].name, []
    for name, what, broken in broken_calls(op, given):
        try:
            run(*(broken[argument] for argument in schemas.argument_names(op)))
        except (OperandError, *errors) as error:
            named = name in str(error) or name == first or name in UNNAMED
            named |= name == "weights" and op in GROUPED_PREPACKED  # as many matrices as other operands have numbers
            if not (named and "lobcq::" in str(error)):
                accepted.append((name, what, str(error)))
        else:
            accepted.append((name, what, "accepted"))
    assert not accepted, "\n".join(map(str, accepted))


def prepacked_call(op: str, x: Tensor, tables: Tensor | None, rest: Sequence[Any]) -> dict[str, Any]:
    """A valid call of one of the prepacked ops; `rest` is from the weights on."""
    weights, scales, weight_tables, biases, outputs, array_size = rest
    residuals = [x.new_ones((*x.shape[:-1], n)) for n in outputs]
    scale = torch.tensor(1e-4, dtype=torch.float32, device=x.device)
    values = {
        "x": x, "gate": x, "up": x * 2, "residual": x * 2, "norm_weight": x.new_ones(x.shape[-1]), "eps": 1e-5,
        "norm_bias": x.new_ones(x.shape[-1]), "offset": 0.0, "round_first": True, "activation_tables": tables,
        "static_scale": scale, "weights": weights, "tensor_scales": scales, "weight_tables": weight_tables,
        "biases": biases, "out_features": outputs, "array_size": array_size, "residuals": residuals,
        "dtype": torch.float32, "rotated": False,
    }  # fmt: skip
    return {name: values[name] for name in schemas.argument_names(op)}


def stored_call(op: str, device: torch.device) -> dict[str, Any]:
    """A valid call of one of the ops on what is stored."""
    generator = torch.Generator().manual_seed(0)
    spec, codebooks = FormatSpec(), universal_codebooks(8).to(device)
    activations = FormatSpec(8, 32)
    x, w = (torch.randn(n, 200, generator=generator).to(device) for n in (3, 20))
    a, weight = encode(x, activations, codebooks, torch.ones(3, 1, device=device)), encode(w, spec, codebooks)
    errors = torch.randn(20, 256, generator=generator).to(device)
    values = {
        "weight": errors * 10, "other_errors": errors, "coupling": torch.eye(256, device=device),
        "power": errors[0].square(),
        "x": x, "w": w, "codebooks": codebooks, "array_size": spec.array_size, "codes": a.codes,
        "static_scale": torch.tensor(1e-4, dtype=torch.float32, device=device), "selectors": a.selectors,
        "scales": a.scales, "tensor_scale": a.tensor_scale, "w_codes": weight.codes, "w_selectors": weight.selectors,
        "w_scales": weight.scales, "w_tensor_scale": weight.tensor_scale, "w_codebooks": codebooks,
        "bias": torch.ones(20, dtype=torch.float32, device=device), "in_features": 200, "dtype": torch.float32,
        "activation_array_size": activations.array_size,
    }  # fmt: skip
    if op == schemas.COMPENSATE:
        values["tensor_scale"] = weight.tensor_scale
    if op == schemas.ROTATE:
        values["x"] = errors
    if op == schemas.QUANTIZE_STATES:
        values["x"] = x.view(1, 4, 3, 50)
    if op == schemas.DEQUANTIZE_STATES:
        rows = torch.ops.lobcq.quantize_states(x.view(1, 4, 3, 50), codebooks, spec.array_size)
        values |= {"rows": rows, "heads": 4, "width": 50}
    if op == schemas.ATTENTION:
        query = torch.randn(3, 4, 3, 50, generator=generator).to(device)
        keys, rows = (torch.ops.lobcq.quantize_states(query[:, :2, :, :width], codebooks, 32) for width in (50, 40))
        values |= {"query": query, "keys": keys, "values": rows, "heads": 2, "value_width": 40, "scale": 0.3}
        values |= {"in_int8": False}
        values |= {"mask": torch.ones(3, 1, 3, 3, device=device) > 0, "key_array_size": 32, "value_array_size": 32}
    if op == schemas.ATTENTION_FLOAT_STATES:
        query, key, value = (torch.randn(3, n, 3, d, generator=generator) for n, d in ((4, 50), (2, 50), (2, 40)))
        values |= {"query": query, "key": key, "value": value, "scale": 0.3, "enable_gqa": True}
        values |= {"mask": torch.ones(3, 1, 3, 3, device=device) > 0}
    if op == schemas.RMS_NORM:
        values |= {"weight": torch.ones(200, device=device), "eps": 1e-5, "normalized": torch.float32}
    if op == schemas.ROTATE_HALF:
        states, cos, sin = (torch.randn(3, n, 3, 50, generator=generator).to(device) for n in (4, 1, 1))
        values |= {"x": states, "cos": cos, "sin": sin, "half": 25}
    if op in SCANS:
        sizes = {"B": 2, "H": 4, "T": 7, "D": 3, "P": 2, "S": 5}
        for operand in OPERANDS[op]:
            shape = [_size_of(str(size), sizes, values) for size in operand.shape]
            values[operand.name] = torch.rand(shape, generator=generator).to(device)
        values |= {"dt_min": 0.1, "dt_max": float("inf"), "chunk_size": 4}
    if op in (schemas.LINEAR_INT8_ACTIVATION, schemas.GROUPED_LINEAR_INT8_ACTIVATION):
        in_int8 = encode_int8(x, spec.array_size)
        values |= {"entries": in_int8.entries, "scales": in_int8.scales}
    if op.startswith(schemas.GROUPED_LINEAR):
        stack = encode_stack(w.view(4, 5, 200), spec, codebooks)
        values |= {f"w_{part}": getattr(stack, part) for part in ("codes", "selectors", "scales", "tensor_scale")}
        values |= {"offsets": torch.tensor([1, 1, 3, 4], dtype=torch.int32, device=device)}
        values |= {"rows": torch.tensor([2, 0, 1, 0, 2], dtype=torch.int64, device=device)}
    return {name: values[name] for name in schemas.argument_names(op)}
