"""Codes to entries by byte permutations: a codebook is 16 bytes, four registers, and three instructions look up four.

Triton's interpreter cannot run PTX: there, and nowhere else, one load an entry takes its place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lobcq_fx.kernels.triton.launching import INTERPRETED
from lobcq_fx.kernels.triton.packed import look_up

LOADED = tl.constexpr(INTERPRETED)

CODEBOOK_ASM = tl.constexpr("""{
.reg .b64 address;
mad.wide.u32 address, $4, 16, $5;
ld.global.nc.v4.b32 {$0, $1, $2, $3}, [address];
}""")
"""Of a selector and the table's address: the codebook's entries, four a word."""

CODEBOOK_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r,l")

# `prmt` takes each byte of its result from eight, by the low three bits of a nibble of its selector. So one looks up
# the lower eight entries, one the upper eight, and a third chooses, byte j or j + 4, by the codes' high bits.
_REGISTERS = """
.reg .b32 low, high, below, above;
and.b32 low, {word}, 0x77777777;
shr.u32 high, {word}, 1;
lop3.b32 high, high, 0x44444444, 0x32103210, 0xEA;"""  # (high & 0x44444444) | 0x32103210

_FOUR = """
prmt.b32 below, {books[0]}, {books[1]}, low;
prmt.b32 above, {books[2]}, {books[3]}, low;
prmt.b32 {out}, below, above, high;"""

_NEXT_FOUR = """
shr.u32 low, low, 16;
shr.u32 high, high, 16;"""

_TO_FP16 = """
xor.b32 bytes, bytes, 0x80808080;
prmt.b32 below, bytes, 0x64646464, 0x4140;
prmt.b32 above, bytes, 0x64646464, 0x4342;
sub.f16x2 {outs[0]}, below, bias;
sub.f16x2 {outs[1]}, above, bias;"""
"""0x6400 + u is the fp16 number 1024 + u, and u is entry + 128."""

_TO_BF16 = """
lop3.b32 bytes, bytes, 0x7F7F7F7F, 0x40404040, 0x6A;
prmt.b32 below, bytes, 0x43434343, 0x4140;
prmt.b32 above, bytes, 0x43434343, 0x4342;
fma.rn.bf16x2 {outs[0]}, below, one, bias;
fma.rn.bf16x2 {outs[1]}, above, one, bias;"""
"""0x4300 + u is the bf16 number 128 + u, and u is entry + 64, of 7 bits; `sub.bf16x2` is not for sm_80."""


def int8_asm() -> str:
    """Of a word of codes and four of a codebook: the entries of eight codes as int8, four a word."""
    books = [f"${i}" for i in range(3, 7)]
    fours = [_FOUR.format(books=books, out=f"${i}") for i in range(2)]
    return "{" + _REGISTERS.format(word="$2") + fours[0] + _NEXT_FOUR + fours[1] + "\n}"


def float_asm(bf16: bool) -> str:
    """The same as fp16 or bf16, two a word."""
    books = [f"${i}" for i in range(5, 9)]
    convert = _TO_BF16 if bf16 else _TO_FP16
    constants = ".reg .b32 bytes, bias, one;\n" + (
        "mov.b32 bias, 0xC340C340;\nmov.b32 one, 0x3F803F80;" if bf16 else "mov.b32 bias, 0x64806480;"
    )  # -192 and 1 in bf16; 1152 in fp16
    four = _FOUR.format(books=books, out="bytes")
    fours = [four + convert.format(outs=[f"${i}", f"${i + 1}"]) for i in (0, 2)]
    return "{\n" + constants + _REGISTERS.format(word="$4") + fours[0] + _NEXT_FOUR + fours[1] + "\n}"


INT8_ASM, FP16_ASM, BF16_ASM = (tl.constexpr(text) for text in (int8_asm(), float_asm(False), float_asm(True)))

# Outputs are written before the last input is read: & keeps them apart.
INT8_CONSTRAINTS = tl.constexpr("=&r,=&r,r,r,r,r,r")
FLOAT_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r")


@triton.jit
def entries_of(codebooks, words, selectors, OPERAND: tl.constexpr):
    """Eight codes a word, int32 [B], and selectors int32 [B] -> entries [B, 8], as int8, fp16 or bf16."""
    if LOADED:
        entries = look_up(codebooks, words, selectors).to(OPERAND)
    else:
        BLOCKS: tl.constexpr = words.shape[0]
        a, b, c, d = tl.inline_asm_elementwise(
            CODEBOOK_ASM, CODEBOOK_CONSTRAINTS, [selectors, codebooks.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        if OPERAND.is_int8():
            e, f = tl.inline_asm_elementwise(
                INT8_ASM, INT8_CONSTRAINTS, [words, a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
            )
            # Taking bytes from words costs nothing: the compiler puts them together again.
            fours = tl.reshape(tl.join(e, f), (BLOCKS, 2, 1))
            entries = tl.reshape((fours >> (8 * tl.arange(0, 4))).to(tl.int8), (BLOCKS, 8))
        else:
            e, f, g, h = tl.inline_asm_elementwise(
                BF16_ASM if OPERAND.is_bf16() else FP16_ASM, FLOAT_CONSTRAINTS, [words, a, b, c, d],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
            pairs = tl.reshape(tl.join(tl.join(e, g), tl.join(f, h)), (BLOCKS, 2, 2, 1))
            halves = (pairs >> (16 * tl.arange(0, 2))).to(tl.int16)
            entries = tl.reshape(halves.to(OPERAND, bitcast=True), (BLOCKS, 8))
    return entries
