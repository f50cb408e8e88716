"""The few PTX instructions that the kernels' inline assembly uses, interpreted: one thread, by the PTX manual."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

MASK = 0xFFFFFFFF
STATEMENT = re.compile(r"([a-z][\w.]*)\s+(.*)")


def run(text: str, inputs: Sequence[int], outputs: int, memory: Mapping[int, int] | None = None) -> list[int]:
    """Run inline assembly with operands $0 ... as Triton numbers them: outputs, then inputs.

    Args:
        text: the assembly, in braces.
        inputs: 32-bit words, or addresses.
        outputs: how many words it writes.
        memory: words by address, for loads.

    Returns:
        The outputs.

    Raises:
        AssertionError: a statement that is not of the subset, a register that is not declared, or a load that is not
            aligned.
        KeyError: a register that is read before it is written.
    """
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    declared = {f"${i}" for i in range(outputs)}
    body = re.fullmatch(r"\s*\{(.*)\}\s*", text, re.DOTALL)
    assert body is not None
    for statement in body[1].split(";"):
        if not (found := STATEMENT.fullmatch(statement.strip())):
            assert not statement.strip() or statement.strip().startswith(".reg"), statement
            if statement.strip():
                declared |= set(re.split(r"[\s,]+", statement.strip().split(maxsplit=2)[2]))
            continue
        name, operands = found[1], re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[2])
        targets = re.findall(r"[$\w]+", operands[0])
        assert set(targets) <= declared, statement
        values = [_value(operand.strip("[]"), registers) for operand in operands[1:]]
        results = _load(values[0], len(targets), memory) if name.startswith("ld.") else [INSTRUCTIONS[name](*values)]
        registers.update(zip(targets, results, strict=True))
    return [registers[f"${i}"] for i in range(outputs)]


def _value(operand: str, registers: Mapping[str, int]) -> int:
    return int(operand, 0) if operand[0].isdigit() else registers[operand]


def _load(address: int, count: int, memory: Mapping[int, int] | None) -> list[int]:
    assert memory is not None
    assert address % (4 * count) == 0, "vector loads are aligned"
    return [memory[address + 4 * i] for i in range(count)]


def _prmt(a: int, b: int, selector: int) -> int:
    """Each nibble of the selector picks a byte of b:a; with its high bit set, that byte's sign, eight times."""
    source, result = b << 32 | a, 0
    for i in range(4):
        nibble = selector >> (4 * i) & 0xF
        byte = source >> (8 * (nibble & 7)) & 0xFF
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << (8 * i)
    return result


def _lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit by bit, what the table has at (a, b, c)."""
    places = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32)]
    return sum((table >> place & 1) << i for i, place in enumerate(places))


def _pairs(dtype: torch.dtype, *words: int) -> list[torch.Tensor]:
    signed = [word - (word >> 31 << 32) for word in words]
    return [torch.tensor([word], dtype=torch.int32).view(dtype) for word in signed]


def _word(pair: torch.Tensor) -> int:
    return int(pair.view(torch.int32).item()) & MASK


def _sub_fp16(a: int, b: int) -> int:
    one, other = _pairs(torch.float16, a, b)
    return _word(one - other)


def _fma_bf16(a: int, b: int, c: int) -> int:
    """In fp32, which is exact for the numbers that are tested, and rounded."""
    one, other, third = (pair.float() for pair in _pairs(torch.bfloat16, a, b, c))
    return _word((one * other + third).bfloat16())


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b & MASK,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "mad.wide.u32": lambda a, b, c: a * b + c,
    "sub.f16x2": _sub_fp16,
    "fma.rn.bf16x2": _fma_bf16,
}
