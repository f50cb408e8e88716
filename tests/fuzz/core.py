"""Call the ops with random operands, most of them broken: `python -m tests.fuzz.core --inputs 100000`.

What is valid gives the reference's result, what is not is refused by an error; nothing crashes, nothing is misread.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import lobcq_fx.ops
from lobcq_fx.errors import LobcqError
from lobcq_fx.format import (
    FormatSpec,
    Operand,
    absmax_row_scale,
    decode,
    encode,
    encode_int8,
    rotate,
    universal_codebooks,
)
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.ops import schemas
from lobcq_fx.ops.contracts import OPERANDS
from tests.fuzz.results import options, report
from tests.kernels.cpu.operands import at_offset
from tests.kernels.products import assert_product
from tests.kernels.violations import PREPACKED, broken_numbers, prepacked_call, stored_call, torch_op, violations

POOL = 24
"""Sets of weights, made once: calls are drawn from them."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REFERENCES = {
    schemas.QUANTIZE_ACTIVATION: lobcq_fx.ops.quantize_activation,
    schemas.QUANTIZE_ACTIVATION_INT8: lobcq_fx.ops.quantize_activation_int8,
    schemas.ROTATE: lobcq_fx.ops.rotate,
    schemas.QUANTIZE_WEIGHT: lobcq_fx.ops.quantize_weight,
    schemas.QUANTIZE_WEIGHT_SEARCHED: lobcq_fx.ops.quantize_weight_searched,
    schemas.DEQUANTIZE_WEIGHT: lobcq_fx.ops.dequantize_weight,
    schemas.WEIGHT_SQUARES: lobcq_fx.ops.weight_squares,
    schemas.COMPENSATE: lobcq_fx.ops.compensate,
    schemas.QUANTIZE_STATES: lobcq_fx.ops.quantize_states,
    schemas.DEQUANTIZE_STATES: lobcq_fx.ops.dequantize_states,
    schemas.ATTENTION: lobcq_fx.ops.attention,
    schemas.ATTENTION_FLOAT_STATES: lobcq_fx.ops.attention_float_states,
    schemas.RMS_NORM: lobcq_fx.ops.rms_norm,
    schemas.ROTATE_HALF: lobcq_fx.ops.rotate_half,
    schemas.LINEAR: lobcq_fx.ops.linear,
    schemas.LINEAR_INT8_ACTIVATION: lobcq_fx.ops.linear_int8_activation,
    schemas.LINEAR_FLOAT_ACTIVATION: lobcq_fx.ops.linear_float_activation,
    schemas.GROUPED_LINEAR: lobcq_fx.ops.grouped_linear,
    schemas.GROUPED_LINEAR_INT8_ACTIVATION: lobcq_fx.ops.grouped_linear_int8_activation,
    schemas.GROUPED_LINEAR_FLOAT_ACTIVATION: lobcq_fx.ops.grouped_linear_float_activation,
}
DRAWN = [*REFERENCES, *PREPACKED, schemas.LINEAR_PREPACKED, schemas.LINEAR_PREPACKED_FLOAT_ACTIVATION]
"""The plain prepacked linears twice as often as others."""


def main() -> None:
    given = options(__doc__, "inputs", 100_000)
    counts = fuzz(given.inputs, given.seed)
    report("core", tried=counts.total(), lost=0, record=given.record, broken=counts["broken"])


def fuzz(inputs: int, seed: int) -> Counter[str]:
    """Draw that many calls; a failure names its input, which `seed` and its number make again.

    Raises:
        AssertionError: a result that is not the reference's, or a broken call that was accepted.
    """
    rng, counts = Random(seed), Counter[str]()
    pool = [Weights(rng) for _ in range(POOL)]
    stored = {op: stored_call(op, torch.device("cpu")) for op in REFERENCES}
    for number in range(inputs):
        one = Random(f"{seed}/{number}")
        op = one.choice(DRAWN)
        weights = one.choice(pool)
        given = dict(stored[op]) if op in stored else weights.call(op, one)
        if op == schemas.ATTENTION:
            given["in_int8"] = one.random() < 0.5
        broken = [] if one.random() < 0.2 else break_some(op, given, one, one.choice(pool))
        counts["broken" if broken else "valid"] += 1
        try:
            run(op, given, broken, weights)
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"input {number} of seed {seed}: {op}, {broken or 'valid'}: {error}") from error
    return counts


def run(op: str, given: dict[str, Any], broken: list[str], weights: Weights) -> None:
    if not broken:
        weights.check(op, given, torch_op(op)(*given.values()))
        return
    with pytest.raises((LobcqError, RuntimeError), match="lobcq"):
        torch_op(op)(*given.values())


class Weights:
    """A few linears of one activation, packed for the core."""

    def __init__(self, rng: Random) -> None:
        self.spec = FormatSpec(rng.choice((1, 2, 4, 8, 16)), rng.choice((16, 32, 64, 128)))
        self.columns = rng.choice((0, 1, 16, 64, 100, 128, 200, 256))
        self.outputs = [rng.choice((0, 1, 16, 17, 33, 48)) for _ in range(rng.choice((1, 1, 2, 3)))]
        layout = weight_layout(torch.device("cpu"))
        assert layout is not None, "the CPU core was not built, or is switched off"
        self.codebooks = universal_codebooks(self.spec.num_codebooks)
        self.tables = layout.tables(self.codebooks)
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        floats = [torch.randn(n, self.columns, generator=generator) for n in self.outputs]
        self.encoded = [encode(w, self.spec, self.codebooks) for w in floats]
        self.packed = [layout.pack((w.codes, w.selectors, w.scales), self.spec, self.columns) for w in self.encoded]

    def call(self, op: str, rng: Random) -> dict[str, Any]:
        """A valid call: any number of rows, strides, addresses and dtypes that the op takes."""
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        rows = rng.choice(((), (0,), (1,), (1,), (2, 3), (17,), (40,)))
        x = torch.randn(*rows, self.columns, generator=generator).to(rng.choice(FLOATS))
        biases = [
            (torch.empty(0) if rng.random() < 0.5 else torch.randn(n, generator=generator)).to(rng.choice(FLOATS))
            for n in self.outputs
        ]
        scales = [w.tensor_scale for w in self.encoded]
        rest = [list(self.packed), scales, self.tables, biases, list(self.outputs), self.spec.array_size]
        given = prepacked_call(op, x, rng.choice((self.tables, None)), rest)
        if "dtype" in given:
            given["dtype"] = rng.choice(FLOATS)
        if "residuals" in given:
            dtype = given.get("dtype", x.dtype)
            given["residuals"] = [residual.to(dtype) for residual in given["residuals"]]
        if "rotated" in given and self.columns % self.spec.array_size == 0:
            given["rotated"] = rng.random() < 0.5
        if rng.random() < 0.5 and "static_scale" in given:
            given["static_scale"] = None
        move = rng.choice((lambda t: t, lambda t: at_offset(t, rng.choice((1, 2, 4))), strided))
        for name in ("x", "gate", "up", "residual"):
            if name in given:
                given[name] = move(given[name])
        return given

    def encoded_rows(self, rows: Tensor, given: dict[str, Any]) -> Operand:
        """What a call makes of its activation."""
        static = given["static_scale"]
        rows = rotate(rows, self.spec.array_size) if given["rotated"] else rows
        if given["activation_tables"] is None:
            return encode_int8(rows, self.spec.array_size, static)
        return encode(rows, self.spec, self.codebooks, absmax_row_scale(rows) if static is None else static)

    def check(self, op: str, given: dict[str, Any], results: Any) -> None:
        """Against the products of what the operands stand for."""
        if op in REFERENCES:
            expected = REFERENCES[op](*given.values())
            parts = [one if isinstance(one, tuple) else (one,) for one in (results, expected)]
            for actual, reference in zip(*parts, strict=True):
                sums = not given.get("in_int8", True) or actual.dtype == torch.float64  # costs
                torch.testing.assert_close(actual, reference, rtol=1e-5 if sums else 0, atol=1e-6 if sums else 0)
            return
        assert [tuple(out.shape[-1:]) for out in results[-len(self.outputs) :]] == [(n,) for n in self.outputs]
        if op not in (schemas.LINEAR_PREPACKED, schemas.LINEAR_PREPACKED_FLOAT_ACTIVATION):
            return  # their parts are compared bit for bit in tests/ops/test_fused.py
        rows = given["x"].float().reshape(given["x"].shape[:-1].numel(), self.columns)
        if "activation_tables" in given:
            rows = decode(self.encoded_rows(rows, given))
        for out, w, bias in zip(results, self.encoded, given["biases"], strict=True):
            assert_product(out.reshape(len(rows), w.shape[0]), rows, w, bias.float() if bias.numel() else None)


def break_some(op: str, given: dict[str, Any], rng: Random, other: Weights) -> list[str]:
    """Break up to three arguments in place; says which and how."""
    if "weights" in given and rng.random() < 0.1:
        return exchange_a_weight(given, rng, other)
    names = [operand.name for operand in OPERANDS[op] if given.get(operand.name) is not None]
    names += ["a number"] if any(broken_numbers(given)) else []
    broken: list[str] = []
    for name in rng.sample(names, k=min(rng.choice((1, 1, 2, 3)), len(names))):
        if name == "a number":
            name, number = rng.choice(list(broken_numbers(given)))
            what, given[name] = f"{number}", number
        else:
            what = break_operand(op, name, given, rng)
        broken.append(f"{name}: {what}")
    return broken


def break_operand(op: str, name: str, given: dict[str, Any], rng: Random) -> str:
    operand = next(operand for operand in OPERANDS[op] if operand.name == name)
    value = given[name]
    place = rng.randrange(len(value)) if isinstance(value, list) else None
    if place is not None and rng.random() < 0.1:
        given[name] = [*value[:place], *value[place + 1 :]]
        return "one less"
    choices = list(violations(op, operand, value if place is None else value[place]))
    # Where every tensor is on another device, nothing is wrong with that.
    alone = sum(isinstance(one, (Tensor, list)) for one in given.values()) > 3
    choices = [one for one in choices if alone or one[1].device.type == "cpu"]
    what, tensor = rng.choice(choices)
    given[name] = tensor if place is None else [*value[:place], tensor, *value[place + 1 :]]
    return f"{place}: {what}"


def exchange_a_weight(given: dict[str, Any], rng: Random, other: Weights) -> list[str]:
    """Put a weight in another's place, cut or filled up to as many bytes: what it says of itself has to tell."""
    place, index = rng.randrange(len(given["weights"])), rng.randrange(len(other.packed))
    mine, new = given["weights"][place], other.packed[index]
    if torch.equal(mine[-64:], new[-64:]):
        return []
    filled = torch.zeros_like(mine)
    filled[: min(len(new), len(mine)) - 64] = new[: min(len(new), len(mine)) - 64]
    filled[-64:] = new[-64:]
    given["weights"] = [*given["weights"][:place], filled, *given["weights"][place + 1 :]]
    return [f"weights: {place} exchanged"]


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


if __name__ == "__main__":
    main()
