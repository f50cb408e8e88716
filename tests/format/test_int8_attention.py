"""Attention in integers against its rules, worked one query and one token at a time."""

from __future__ import annotations

import math

import pytest
import torch

import lobcq_fx.ops
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.format.int8_attention import exp

TILE, MOST = 64, 127


def entries_and_scales(rows: torch.Tensor, heads: int, width: int, spec: FormatSpec) -> list[list[list[tuple]]]:
    """For each token and head, of rows of one sequence: (entries, scale, tensor scale) of its block arrays."""
    codebooks, found = universal_codebooks(spec.num_codebooks).tolist(), []
    padded = -(-width // spec.array_size) * spec.array_size
    parts = (padded // 2, math.ceil(padded / 8 * spec.selector_bits / 8), padded // spec.array_size)
    for row in rows[0]:
        tensor_scale, heads_of_row = row[:4].clone().view(torch.float32).item(), []
        for codes, selectors, scales in (head.split(parts) for head in row[4:].view(heads, sum(parts))):
            bits = sum(byte << 8 * place for place, byte in enumerate(selectors.tolist()))
            numbers = [nibble for byte in codes.tolist() for nibble in (byte & 15, byte >> 4)]
            chosen = [bits >> i // 8 * spec.selector_bits & spec.num_codebooks - 1 for i in range(padded)]
            entries = [codebooks[book][code] for book, code in zip(chosen, numbers, strict=True)]
            values = scales.clone().view(torch.float8_e4m3fn).float().tolist()
            size = spec.array_size
            arrays = [(entries[g * size : (g + 1) * size], s, tensor_scale) for g, s in enumerate(values)]
            heads_of_row.append(arrays)
        found.append(heads_of_row)
    return found


def one_query(query: list[float], keys: list, values: list, added: list[float], scale: float, size: int) -> list[float]:
    """What one query of one head gets, in float64 but for what is rounded to integers and to E4M3."""
    query = query + [0.0] * (-len(query) % size)
    row_scale = max(map(abs, query)) / (127 * 448)
    scores = [0.0] * len(keys)
    for g in range(len(query) // size):
        array = query[g * size : (g + 1) * size]
        ratio = max(map(abs, array)) / 127 / row_scale
        e4m3 = [
            v for v in torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist() if v >= ratio - 1e-4
        ]
        ours = [round(x / (e4m3[0] * row_scale)) for x in array]
        for j, key in enumerate(keys):
            entries, array_scale, token_scale = key[g]
            dot = sum(a * b for a, b in zip(ours, entries, strict=True))
            scores[j] += dot * e4m3[0] * array_scale * token_scale * row_scale * scale
    scores = [s + a for s, a in zip(scores, added, strict=True)]
    out, total, highest = [0.0] * (len(values[0]) * len(values[0][0][0])), 0.0, max(scores)
    for first in range(0, len(scores), TILE):
        tile = [math.exp(s - highest) for s in scores[first : first + TILE]]
        total += sum(tile)
        for g, (entries, _, _) in enumerate(values[0]):
            arrays = [value[g] for value in values[first : first + TILE]]
            folded = [weight * s * t for weight, (_, s, t) in zip(tile, arrays, strict=True)]
            step = max(folded) / MOST
            if step == 0:
                continue
            for d in range(len(entries)):
                whole = sum(round(w / step) * one[d] for w, (one, _, _) in zip(folded, arrays, strict=True))
                out[g * len(entries) + d] += whole * step
    return [x / total for x in out]


@pytest.mark.parametrize(("width", "spec"), [(32, FormatSpec(8, 16)), (20, FormatSpec(16, 32)), (64, FormatSpec())])
def test_it_is_what_its_rules_say(width, spec):
    generator = torch.Generator().manual_seed(width)
    heads, groups, tokens, queries = 2, 2, 90, 3
    codebooks = universal_codebooks(spec.num_codebooks)
    states = (torch.randn(1, heads, tokens, width, generator=generator) for _ in range(2))
    keys, values = (lobcq_fx.ops.quantize_states(state, codebooks, spec.array_size) for state in states)
    query = 2 * torch.randn(1, heads * groups, queries, width, generator=generator)
    mask = torch.randn(1, heads * groups, queries, tokens, generator=generator)
    mask[..., 70:75] = -torch.inf
    sizes = (heads, width, spec.array_size, spec.array_size, 0.2, True)
    out = lobcq_fx.ops.attention(query, keys, values, codebooks, mask, *sizes)
    key, value = (entries_and_scales(rows, heads, width, spec) for rows in (keys, values))
    for head in range(heads * groups):
        ours = [token[head // groups] for token in key], [token[head // groups] for token in value]
        for number in range(queries):
            added = mask[0, head, number].tolist()
            expected = one_query(query[0, head, number].tolist(), *ours, added, 0.2, spec.array_size)[:width]
            # A weight or two may fall on the other side of a half in fp32: a step of 127 of one token's value.
            error = (out[0, head, number].double() - torch.tensor(expected, dtype=torch.float64)).abs()
            assert error.median() < 1e-6
            assert error.max() < 3e-3


def test_e_to_the_x():
    x = -torch.cat((torch.linspace(0, 87, 100_001), torch.tensor([0.0, 1e-30])))
    exact = x.double().exp()
    assert ((exp(x).double() - exact) / exact).abs().max() < 2.0**-22
    assert exp(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert exp(torch.tensor([-87.1, -1e30, -torch.inf])).tolist() == [0.0, 0.0, 0.0]
    assert exp(torch.tensor(torch.nan)).isnan()
