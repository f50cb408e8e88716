"""The formats that LO-BCQ is compared with, under the same treatment: their feedback is the textbook's."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.peer_formats import MXFP4, NF4_BLOCKS, NVFP4, BlockFormat, int4
from benchmarks.quality.treated_formats import FORMATS, Blocks, LoBcq, int8_activation
from lobcq_fx import FormatSpec
from lobcq_fx.calibration.compensate import DAMPING
from lobcq_fx.format import decode, encode, universal_codebooks

PEERS = {"NVFP4": Blocks(NVFP4), "MXFP4": Blocks(MXFP4), "INT4": Blocks(int4(32)), "NF4": Blocks(NF4_BLOCKS)}


def correlated(rows, columns):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    return torch.randn(rows, columns, generator=generator) @ mixing


def weight(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def by_the_textbook(w, moments, blocks):
    """Optimal brain surgery: each column's error goes to those to come, by the inverse of H over them."""
    columns = moments.diagonal().view(-1, blocks.block).sum(1).argsort(descending=True)
    columns = torch.arange(w.shape[1]).view(-1, blocks.block)[columns].flatten()
    values, result = w[:, columns], torch.empty_like(w)
    damping = DAMPING * moments.diagonal().mean()
    inverse = torch.linalg.inv(moments[columns][:, columns] + torch.eye(len(columns), dtype=torch.float64) * damping)
    for place, column in enumerate(columns.tolist()):
        rounded = blocks.levels(values[:, place] / 0.3) * 0.3
        result[:, column] = rounded
        errors = (values[:, place] - rounded) / inverse[place, place]
        values = values - errors[:, None] * inverse[place]
        inverse = inverse - torch.outer(inverse[:, place], inverse[place]) / inverse[place, place]
    return result


def test_feedback_is_the_textbooks():
    blocks = BlockFormat(32, 16, int4(32).levels, lambda x, _largest: torch.full_like(x[..., :1], 0.3))
    x, w = correlated(500, 128).double(), weight(12, 128).double()
    assert torch.equal(Blocks(blocks).weight(w, x.T @ x), by_the_textbook(w, x.T @ x, blocks))


@pytest.mark.parametrize("name", PEERS)
def test_peers_gain_by_compensation(name):
    x, w = correlated(500, 128), weight(12, 128)
    cost = [(((w - one) @ x.T) ** 2).sum() for one in (PEERS[name].weight(w, x.T @ x), PEERS[name].weight(w, None))]
    assert cost[0] < 0.8 * cost[1]


@pytest.mark.parametrize("name", FORMATS)
def test_searched_scales_are_never_worse_than_those_of_activations(name):
    w = weight(16, 256)
    errors = [(w - one).square().sum() for one in (FORMATS[name].weight(w, None), FORMATS[name].activation(w))]
    assert errors[0] <= errors[1] * 1.001  # an activation's rows have a scale each, a weight has one


def test_activations_are_what_the_format_says():
    x = weight(6, 128)[None]
    spec = FormatSpec(8, 64)
    rows = [decode(encode(row[None], spec, universal_codebooks(8))) for row in x[0]]
    assert torch.equal(LoBcq(spec).activation(x)[0], torch.cat(rows))
    assert float((int8_activation(x) - x).abs().max()) <= float(x.abs().max()) / 254 * 1.001
    assert torch.equal(int8_activation(torch.zeros(1, 64)), torch.zeros(1, 64))
