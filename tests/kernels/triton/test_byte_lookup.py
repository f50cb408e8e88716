"""The assembly that looks up codes, run by an interpreter of its PTX: Triton's cannot. Against the table look-up."""

from __future__ import annotations

import random

import pytest
import torch

from lobcq_fx.format import FormatSpec
from lobcq_fx.format.spec import ALLOWED_NUM_CODEBOOKS
from lobcq_fx.kernels.triton import byte_lookup
from tests.kernels.triton import ptx
from tests.kernels.triton.operands import codebooks

ADDRESS = 0x7F00_0000_1230
OPERANDS = {
    torch.int8: (byte_lookup.INT8_ASM.value, byte_lookup.INT8_CONSTRAINTS.value),
    torch.float16: (byte_lookup.FP16_ASM.value, byte_lookup.FLOAT_CONSTRAINTS.value),
    torch.bfloat16: (byte_lookup.BF16_ASM.value, byte_lookup.FLOAT_CONSTRAINTS.value),
}


def words_of(books: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in books.reshape(-1).view(torch.int32).tolist()]


def numbers(words: list[int], dtype: torch.dtype) -> torch.Tensor:
    """What registers hold."""
    return torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32).view(dtype)


def assert_looks_up(codes: list[int], book: torch.Tensor, dtype: torch.dtype) -> None:
    """Eight codes."""
    text, constraints = OPERANDS[dtype]
    word = sum(code << (4 * i) for i, code in enumerate(codes))
    outputs = constraints.count("=")
    found = numbers(ptx.run(text, [word, *words_of(book)], outputs), dtype)
    assert torch.equal(found, book[codes].to(dtype)), (codes, book.tolist())


def extreme() -> torch.Tensor:
    """Every number that a codebook may hold, in rows of 16."""
    return torch.tensor([*range(-31, 32), 31], dtype=torch.int8).view(4, 16)


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_every_code_in_every_place(dtype: torch.dtype) -> None:
    for book in extreme():
        for place in range(8):
            for code in range(16):
                assert_looks_up([code if i == place else 15 - code for i in range(8)], book, dtype)


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_random_words(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    for book in codebooks(FormatSpec(16, 64)).cpu():
        for _ in range(30):
            assert_looks_up(rng.choices(range(16), k=8), book, dtype)


@pytest.mark.parametrize("num_codebooks", ALLOWED_NUM_CODEBOOKS)
def test_the_selected_codebook_is_loaded(num_codebooks: int) -> None:
    books = codebooks(FormatSpec(num_codebooks, 64)).cpu()
    memory = {ADDRESS + 4 * i: word for i, word in enumerate(words_of(books))}
    for selector, book in enumerate(books):
        found = ptx.run(byte_lookup.CODEBOOK_ASM.value, [selector, ADDRESS], 4, memory)
        assert found == words_of(book)


@pytest.mark.parametrize(("text", "constraints"), OPERANDS.values(), ids=map(str, OPERANDS))
def test_no_output_shares_a_register_with_an_input_that_is_still_to_be_read(text: str, constraints: str) -> None:
    """Unless it is marked, an output may be given an input's register. Here: all are marked, and all are named once."""
    parts = constraints.split(",")
    assert [part for part in parts if part.startswith("=")] == ["=&r"] * constraints.count("=")
    assert all(f"${i}" in text for i in range(len(parts)))
    assert f"${len(parts)}" not in text


@pytest.mark.parametrize(
    ("a", "b", "selector", "expected"),
    [
        (0x33221100, 0x77665544, 0x7531, 0x77553311),
        (0x80FF7F01, 0, 0xBA98, 0xFFFF0000),  # signs
        (0x80FF7F01, 0x11223344, 0xF0000, 0x01010101),  # more bits of the selector mean nothing
    ],
)
def test_byte_permutation(a: int, b: int, selector: int, expected: int) -> None:
    """By the examples of the PTX manual's rule, so that the interpreter is not only tested by what it tests."""
    assert ptx.run("{\nprmt.b32 $0, $1, $2, $3;\n}", [a, b, selector], 1) == [expected]


def test_three_input_logic() -> None:
    a, b, c = 0b11110000, 0b11001100, 0b10101010
    for table, expected in ((0xEA, (a & b) | c), (0x6A, (a & b) ^ c), (0x80, a & b & c)):
        assert ptx.run(f"{{\nlop3.b32 $0, $1, $2, $3, {table:#x};\n}}", [a, b, c], 1) == [expected]
