"""What the self-check leaves out: values that masks hide and rows that are only rounding. Nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.errors import ExportError
from lobcq_fx.export import export_onnx
from lobcq_fx.export.hidden import find_hidden
from lobcq_fx.export.self_check import _agreement, _difference
from lobcq_fx.export.signature import signature_of
from lobcq_fx.export.stored_module import stored_module
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.tracing.trace import trace_module
from tests.export.checked import export_checked
from tests.export.sessions import Session
from tests.families import quantized_causal_lm


class Windows(nn.Module):
    """Two layers of attention whose windows are narrower than the padding: some of that sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.outof = (nn.ModuleList(nn.Linear(64, 64) for _ in range(2)) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor):
        positions = torch.arange(x.shape[1])
        near = (positions[:, None] - positions[None]).abs() <= 2
        seen = (near[None] & mask[:, None].bool())[:, None]
        for into, outof in zip(self.into, self.outof, strict=True):
            states = into(x).unflatten(-1, (4, 16)).transpose(1, 2)
            attended = nn.functional.scaled_dot_product_attention(states, states, states, attn_mask=seen)
            x = x + outof(attended.transpose(1, 2).flatten(2))
        return x


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A quantized model, an example of which most is padding, and the export on it."""
    example = {"x": torch.randn(2, 9, 64), "mask": torch.ones(2, 9, dtype=torch.long)}
    example["mask"][0, 3:] = 0
    q = lobcq_fx.quantize(Windows().eval(), example_inputs=example)
    return q, example, export_checked(q, tmp_path_factory.mktemp("padded") / "out", example)


def test_padding_that_sees_nothing_is_not_compared(padded):
    q, example, exported = padded
    assert exported.summary.differences.functions < 1e-5
    ours, theirs = q(**example), Session(exported.folder)(**example)["output"]
    assert (ours - theirs)[0, 6:].abs().max() > 0.1  # what would have been refused


def test_a_fault_beside_hidden_rows_is_found(padded, tmp_path):
    with pytest.raises(ExportError, match="output output differs by"):
        padded[2].check_with_a_scale_off("outof.1.weight.tensor_scale", tmp_path / "wrong.onnx")


def test_language_models_are_checked_on_padded_prompts():
    """Of the padding nothing counts, of the tokens everything."""
    _, q = quantized_causal_lm("gpt-neox")
    signature = signature_of(q, None)
    prompt = dict(zip(signature.inputs, signature.samples[0], strict=True))
    assert prompt["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    hidden = find_hidden(stored_module(q), signature.samples[0])
    logits = hidden.values[signature.outputs.index("logits")]
    assert logits.all(-1).tolist() == [[True, True, False], [False, False, False]]
    assert not logits[0, 2].any()
    assert not logits[1].any()
    for rows in hidden.rows.values():
        assert not rows.view(2, 3)[0, 2]
        assert not rows.view(2, 3)[1].any()


class Attention(nn.Module):
    """Attention, and a linear layer behind it that masks do not concern."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor):
        attended = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return attended, x + 1, attended.square()


@pytest.mark.parametrize("additive", [False, True])
def test_what_follows_from_a_query_without_keys_is_hidden(additive):
    x, mask = torch.randn(2, 1, 4, 8), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, :2] = False
    mask[1, 0, 3, 1:] = False
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    graph_module = trace_module(Attention(), (x, mask)).graph_module
    attended, untouched, behind = find_hidden(graph_module, (x, mask)).values
    for hidden in (attended, behind):
        assert hidden[0, 0, :2].all()
        assert hidden.sum() == 2 * 8
    assert not untouched.any()
    assert not find_hidden(graph_module, (x, torch.ones_like(mask))).values


def encoded(x):
    ops = torch.ops.lobcq
    parts = ops.quantize_activation(x, universal_codebooks(8), FormatSpec().array_size, None)
    return [part.view(torch.uint8) if part.element_size() == 1 else part for part in parts]


def test_a_row_of_rounding_is_not_compared_and_a_small_one_is():
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    for magnitude, expected in ((1e-7, 1.0), (1e-5, 0.0)):
        one, other = x.clone(), x.clone()
        one[7], other[7] = magnitude * x[8], -1.3 * magnitude * x[9]
        assert _agreement(encoded(other), encoded(one)) == expected
    other = x.clone()
    other[3] = 1e-7 * x[8]  # torch has zeros there
    assert _agreement(encoded(other), encoded(x)) == 1.0
    other[5, 5] = torch.nan
    assert _agreement(encoded(other), encoded(x)) == 0.0
    assert _agreement(encoded(x), encoded(other)) == 0.0
    assert _agreement(encoded(x), encoded(torch.zeros_like(x))) == 0.0


def test_hidden_values_are_left_out_and_no_others():
    expected = torch.tensor([1.0, 2.0, 3.0])
    hidden = torch.tensor([False, True, False])
    assert _difference("y", expected, torch.tensor([1.0, torch.nan, 3.0]), "ONNX Runtime", hidden) == 0
    with pytest.raises(ExportError, match="output y differs by up to 1 between"):
        _difference("y", expected, torch.tensor([1.0, 2.0, 4.0]), "ONNX Runtime", hidden)
    with pytest.raises(ExportError, match="hide all of output y"):
        _difference("y", expected, expected, "ONNX Runtime", torch.ones(3, dtype=torch.bool))


class TinyEpsilon(nn.Module):
    """Norms as Helium does; and a factor that is nearly, but not, 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor):
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)
        return self.linear(normed), (x * 1.000005 - x) * 1e6


def test_constants_near_zero_and_one_are_kept(tmp_path):
    x = torch.randn(2, 3, 64)
    x[0, 1] = 0
    q = lobcq_fx.quantize(TinyEpsilon().eval(), example_inputs=x)
    export_onnx(q, tmp_path / "out", x)
