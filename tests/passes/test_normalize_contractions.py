"""normalize_contractions: convolutions, einsums and batched products with a constant become linear; others stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lobcq_fx.config import LobcqConfig
from lobcq_fx.graph.matmuls import find_matmuls
from lobcq_fx.graph.operands import operation_name
from lobcq_fx.passes.infra import PassResult
from lobcq_fx.passes.normalize_contractions import NormalizeContractions
from tests.passes.graphs import (
    Function,
    assert_metadata,
    assert_unchanged,
    aten,
    graph_of,
    names,
    nodes,
    parameter,
    rewritten,
    run,
    targets,
    values,
)  # fmt: skip

TOKENS = (2, 5, 64)
IMAGE = (2, 3, 8, 12)
STACKED = {"w": parameter(4, 64, 8)}
MATRIX = {"w": parameter(64, 32)}


def conv(kind, *args, **kwargs):
    torch.manual_seed(0)
    return {"c": kind(*args, **kwargs)}


def expanded(weight, x):
    return weight.expand(x.shape[0], *weight.shape[-2:])


# What is computed, its members, the example's shape, another shape that the graph serves, (N, K).
MATCHES = {
    "einsum, heads apart": (
        lambda m, x: torch.einsum("bnd,hdk->bnhk", x, m.w), STACKED, TOKENS, (3, 7, 64), (32, 64),
    ),
    "einsum, heads together": (
        lambda m, x: torch.einsum("hdk,bnd->nbhk", m.w, x), STACKED, TOKENS, (3, 7, 64), (32, 64),
    ),
    "einsum over two indices": (
        lambda m, x: torch.einsum("ibnd,hnd->ibh", x.unflatten(-1, (8, 8)), m.w),
        {"w": parameter(32, 8, 8)}, TOKENS, (3, 7, 64), (32, 64),
    ),
    "einsum with dots": (lambda m, x: torch.einsum("...d,de", x, m.w), MATRIX, TOKENS, (3, 7, 64), (32, 64)),
    "einsum of a transpose": (
        lambda m, x: torch.einsum("bnd,ed->ben", x, m.w.t()), MATRIX, TOKENS, (3, 7, 64), (32, 64),
    ),
    "einsum of a vector": (lambda m, x: torch.einsum("d,de->e", x, m.w), MATRIX, (64,), (64,), (32, 64)),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=([2], [1])), STACKED, TOKENS, (3, 7, 64), (32, 64)),
    "tensordot from the left": (
        lambda m, x: torch.tensordot(m.w, x, dims=([-2], [-1])), STACKED, TOKENS, (3, 7, 64), (32, 64),
    ),
    "addbmm": (
        lambda m, x: torch.addbmm(m.b, x, m.w), {"w": parameter(4, 64, 8), "b": parameter(8)}, (4, 5, 64), (4, 7, 64),
        (8, 256),
    ),
    "matmul of a stack of one": (lambda m, x: x @ m.w, {"w": parameter(1, 64, 32)}, TOKENS, (3, 7, 64), (32, 64)),
    "bmm of one matrix": (lambda m, x: torch.bmm(x, expanded(m.w, x)), MATRIX, TOKENS, (3, 7, 64), (32, 64)),
    "bmm of one transpose": (
        lambda m, x: torch.bmm(x, expanded(m.w[None], x).transpose(1, 2)), {"w": parameter(32, 64)}, TOKENS, (3, 7, 64),
        (32, 64),
    ),
    "baddbmm of one matrix": (
        lambda m, x: torch.baddbmm(m.b, x, expanded(m.w, x)), {**MATRIX, "b": parameter(1, 1, 32)}, TOKENS, (3, 7, 64),
        (32, 64),
    ),
    "conv1d of one": (lambda m, x: m.c(x), conv(nn.Conv1d, 5, 6, 1), TOKENS, (3, 5, 9), (6, 5)),
    "conv2d of one": (lambda m, x: m.c(x), conv(nn.Conv2d, 3, 6, 1, bias=False), IMAGE, (1, 3, 5, 5), (6, 3)),
    "conv2d of one, of an image alone": (lambda m, x: m.c(x), conv(nn.Conv2d, 3, 6, 1), IMAGE[1:], (3, 5, 7), (6, 3)),
    "conv2d of one in steps": (lambda m, x: m.c(x), conv(nn.Conv2d, 3, 6, 1, 2), IMAGE, (1, 3, 5, 5), (6, 3)),
    "conv2d of one, dilated and padded the same": (
        lambda m, x: m.c(x), conv(nn.Conv2d, 3, 6, 1, padding="same", dilation=2), IMAGE, (1, 3, 5, 5), (6, 3),
    ),
    "patches": (lambda m, x: m.c(x), conv(nn.Conv2d, 3, 6, 4, 4), IMAGE, (1, 3, 4, 16), (6, 48)),
    "patches with a rest": (lambda m, x: m.c(x), conv(nn.Conv2d, 3, 6, 4, 4), (2, 3, 9, 11), (3, 3, 7, 18), (6, 48)),
    "patches, valid": (
        lambda m, x: m.c(x), conv(nn.Conv2d, 3, 6, 4, 4, padding="valid"), IMAGE, (1, 3, 4, 16), (6, 48),
    ),
    "windows with gaps between": (
        lambda m, x: m.c(x), conv(nn.Conv2d, 3, 6, (2, 1), (3, 2)), IMAGE, (3, 3, 7, 18), (6, 6),
    ),
    "conv1d of patches": (lambda m, x: m.c(x), conv(nn.Conv1d, 5, 6, 2, 2), TOKENS, (3, 5, 9), (6, 10)),
    "conv3d of patches": (
        lambda m, x: m.c(x), conv(nn.Conv3d, 3, 6, (2, 4, 4), (2, 4, 4)), (2, 3, 4, 8, 8), (3, 3, 2, 9, 8), (6, 96),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MATCHES)
def test_what_is_a_matmul_becomes_linear(case):
    function, members, shape, other, expected = MATCHES[case]
    model = Function(function, **members)
    graph_module = graph_of(model, values(*shape))
    before = [target for target in targets(graph_module) if target in (aten.einsum.default, aten.conv2d.default)]
    result = NormalizeContractions()(graph_module)
    assert result == PassResult(graph_module, True)
    assert not set(before) & set(targets(graph_module))

    (matmul,) = find_matmuls(graph_module)
    assert matmul.obstacle is None
    assert (matmul.shape, matmul.layer) == (expected, next(iter(members)))
    operation = case.replace(",", "").split(" ")[0]
    assert operation_name(matmul.node) == ("conv2d" if operation in ("patches", "windows") else operation)
    weights = {name: tensor.dim() for name, tensor in graph_module.state_dict().items() if name in ("w", "c.weight")}
    assert list(weights.values()) == [2], "the matrix has the constant's name"
    assert len(names(graph_module)) == len(model.state_dict())

    assert_metadata(graph_module, values(*shape))
    for size in (shape, other):
        x = values(*size)
        torch.testing.assert_close(run(graph_module, x), model(x), rtol=1e-5, atol=1e-4)
    assert_unchanged(NormalizeContractions(), graph_module)


LEFT = {
    "a convolution whose windows overlap, not a matmul": (nn.Conv2d(3, 6, 3, 2), aten.conv2d.default),
    "a convolution over padding, not a matmul": (nn.Conv2d(3, 6, 4, 4, padding=1), aten.conv2d.default),
    "a convolution with gaps in its windows, not a matmul": (nn.Conv2d(3, 6, 2, 3, dilation=2), aten.conv2d.default),
    "a convolution of 3 groups, not a matmul": (nn.Conv2d(3, 6, 1, groups=3), aten.conv2d.default),
}


@pytest.mark.parametrize("reason", LEFT)
def test_other_convolutions_stay_with_a_reason(reason):
    module, target = LEFT[reason]
    graph_module = graph_of(module, values(*IMAGE))
    assert targets(graph_module) == [target]
    assert_unchanged(NormalizeContractions(), graph_module)
    assert [matmul.obstacle for matmul in find_matmuls(graph_module)] == [reason]


NEAR_MISSES = {
    "activations": (lambda m, x: torch.einsum("bnd,bmd->bnm", x, x), {}),
    "three operands": (lambda m, x: torch.einsum("bnd,de,e->bn", x, m.w, m.v), {**MATRIX, "v": parameter(32)}),
    "a matrix for each index": (
        lambda m, x: torch.einsum("bnd,nde->bne", x[:, :4], m.w), {"w": parameter(4, 64, 8)},
    ),
    "a vector": (lambda m, x: torch.einsum("bnd,d->bn", x, m.w), {"w": parameter(64)}),
    "an outer product": (lambda m, x: torch.einsum("bnd,e->bnde", x, m.w), {"w": parameter(8)}),
    "a sum of the activation alone": (lambda m, x: torch.einsum("bnd,de->be", x, m.w), MATRIX),
    "a sum of the constant alone": (lambda m, x: torch.einsum("bnd,de->bn", x, m.w), MATRIX),
    "a diagonal": (lambda m, x: torch.einsum("bdd,de->be", x[:, :, :5], m.w), {"w": parameter(5, 8)}),
    "a size that is broadcast": (lambda m, x: torch.einsum("bnd,de->bne", x, m.w), {"w": parameter(1, 8)}),
    "computed": (lambda m, x: torch.einsum("bnd,de->bne", x, m.w * 2), MATRIX),
    "addbmm with a factor": (
        lambda m, x: torch.addbmm(m.b, x, m.w, alpha=2), {"w": parameter(2, 64, 8), "b": parameter(8)},
    ),
    "a stack of two": (lambda m, x: x @ m.w, {"w": parameter(2, 64, 8)}),
    "a matrix times a stack of one": (lambda m, x: x[0] @ m.w, {"w": parameter(1, 64, 8)}),
    "a weight that is written to": (
        lambda m, x: functional.conv1d(x, m.w.mul_(0.5)), {"w": nn.Parameter(values(6, 5, 1), requires_grad=False)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_stay_as_they_are(case):
    function, members = NEAR_MISSES[case]
    graph_module = graph_of(Function(function, **members), values(*TOKENS))
    assert_unchanged(NormalizeContractions(), graph_module)


def test_a_constant_that_is_read_otherwise_stays_and_a_matrix_stands_beside_it():
    model = Function(lambda m, x: m.c(x) * m.c.weight.sum() + m.c(x.flip(0)), **conv(nn.Conv1d, 5, 5, 1))
    graph_module = graph_of(model, values(*TOKENS))
    NormalizeContractions()(graph_module)
    assert names(graph_module) == {"c.weight", "c.bias", "c.weight_matrix"}
    assert graph_module.c.weight_matrix.data_ptr() == model.c.weight.data_ptr()
    assert [(matmul.layer, matmul.shape) for matmul in find_matmuls(graph_module)] == [("c", (5, 5))] * 2
    torch.testing.assert_close(run(graph_module, values(*TOKENS)), model(values(*TOKENS)))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"exclude": ("patch_*",)}, "excluded by pattern 'patch_*'"),
        ({"min_in_features": 49}, "too small: K = 48 is below min_in_features = 49"),
        ({}, None),
    ],
)
def test_settings_name_a_convolution_by_its_module(settings, reason):
    model = Function(lambda m, x: m.patch_embed(x), patch_embed=nn.Conv2d(3, 6, 4, 4))
    graph_module = graph_of(model, values(*IMAGE))
    NormalizeContractions()(graph_module)
    _, (record,) = rewritten(graph_module, LobcqConfig(**settings))
    assert (record.layer, record.operation, record.shape) == ("patch_embed", "conv2d", (6, 48))
    assert (record.reason, record.multiply_adds) == (reason, 2 * 2 * 3 * 6 * 48)
    if reason is not None:
        torch.testing.assert_close(run(graph_module, values(*IMAGE)), model(values(*IMAGE)), rtol=1e-5, atol=1e-5)


def test_the_model_keeps_its_weight_and_its_memory_is_the_graph_s():
    model = Function(lambda m, x: m.c(x), **conv(nn.Conv2d, 3, 6, 4, 4))
    graph_module = graph_of(model, values(*IMAGE))
    NormalizeContractions()(graph_module)
    assert model.c.weight.shape == (6, 3, 4, 4)
    assert graph_module.c.weight.data_ptr() == model.c.weight.data_ptr()


def test_convolutions_of_one_image_read_the_same_rows():
    model = Function(lambda m, x: m.a(x) + m.b(x), a=nn.Conv1d(5, 6, 1), b=nn.Conv1d(5, 6, 1))
    graph_module = graph_of(model, values(*TOKENS))
    NormalizeContractions()(graph_module)
    first, second = nodes(graph_module, aten.linear.default)
    assert first.args[0] is second.args[0]


def test_rows_are_made_anew_after_a_write():
    def twice(m, x):
        first = m.c(x)
        x[:, 0].zero_()
        return first + m.c(x)

    model = Function(twice, **conv(nn.Conv1d, 5, 6, 2, 2))
    graph_module = graph_of(model, values(*TOKENS))
    NormalizeContractions()(graph_module)
    torch.testing.assert_close(run(graph_module, values(*TOKENS)), model(values(*TOKENS)))


VIEWS = {
    "needs the order": (lambda m, x: functional.gelu(m.c(x)).view(x.shape[0], -1), 1),
    "fits rows": (lambda m, x: functional.gelu(m.c(x)).flatten(2).transpose(1, 2), 0),
    "of channels beside each other": (lambda m, x: m.c(x).view(x.shape[0], 6, -1), 0),
    "written to through a view": (lambda m, x: (lambda y: (y.view(-1).zero_(), y)[1])(m.c(x)), 1),
}


@pytest.mark.parametrize("case", VIEWS)
def test_results_are_copied_where_a_view_needs_them_contiguous(case):
    function, copies = VIEWS[case]
    model = Function(function, **conv(nn.Conv2d, 3, 6, 4, 4))
    graph_module = graph_of(model, values(*IMAGE))
    NormalizeContractions()(graph_module)
    assert targets(graph_module).count(aten.contiguous.default) == copies
    for x in (values(*IMAGE), values(3, 3, 12, 4), values(*IMAGE).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(run(graph_module, x), model(x.contiguous()), rtol=1e-5, atol=1e-5)
    assert_metadata(graph_module, values(*IMAGE))
