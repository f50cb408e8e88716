"""Roles: heads stay in float whatever they are called; what only sounds like a norm or an embedding does not."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import lobcq_fx
from lobcq_fx.errors import ConfigError
from lobcq_fx.frontends.roles import roles_of
from tests.passes.graphs import linear, values

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 32, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip

HEADS = {
    "BertForMaskedLM": ("BertConfig", {}, {"cls.predictions.decoder"}),
    "BertForPreTraining": ("BertConfig", {}, {"cls.predictions.decoder"}),
    "BertForQuestionAnswering": ("BertConfig", {"num_labels": 2}, {"qa_outputs"}),
    "BertForTokenClassification": ("BertConfig", {}, {"classifier"}),
    "RobertaForSequenceClassification": ("RobertaConfig", {}, {"classifier.out_proj"}),
    "RobertaForMaskedLM": ("RobertaConfig", {}, {"lm_head.decoder"}),
    "ModernBertForMaskedLM": ("ModernBertConfig", {}, {"decoder"}),
    "XLMRobertaForMultipleChoice": ("XLMRobertaConfig", {"num_labels": 1}, {"classifier"}),
    "BioGptForCausalLM": ("BioGptConfig", {}, {"output_projection"}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {}, {"lm_head"}),
    "BertModel": ("BertConfig", {}, set()),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_heads_by_what_they_do(name):
    config_name, options, expected = HEADS[name]
    config = getattr(transformers, config_name)(**{**SMALL, **options})
    assert set(roles_of(getattr(transformers, name)(config))) == expected


@torch.no_grad()
@pytest.mark.usefixtures("traced_once")
def test_a_head_by_another_name_stays_in_float_and_can_be_had_by_its_role():
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL)).eval()
    reasons = {record.layer: record.reason for record in lobcq_fx.quantize(model).inventory}
    assert reasons["classifier.out_proj"] == "excluded by pattern '@head'"
    assert reasons["classifier.dense"] is None
    config = lobcq_fx.LobcqConfig(exclude=(), overrides={"@head": {"mode": "w4a16"}})
    modes = {record.layer: record.mode for record in lobcq_fx.quantize(model, config=config).inventory}
    assert (modes["classifier.out_proj"], modes["classifier.dense"]) == ("w4a16", "w4a4")


class AdaptiveNorm(nn.Module):
    """As in diffusion transformers: a norm whose shift and scale are linear in the time's embedding."""

    def __init__(self):
        super().__init__()
        self.time_embed = nn.Sequential(linear(64, 64), nn.SiLU(), linear(64, 64))
        self.norm1 = nn.Module()
        self.norm1.linear = linear(128, 64)
        self.proj_out = linear(64, 64)

    def forward(self, x, t):
        shift, scale = self.norm1.linear(self.time_embed(t)).chunk(2, dim=-1)
        return self.proj_out(nn.functional.layer_norm(x, (64,)) * (1 + scale) + shift)


def test_linears_within_norms_and_embeddings_are_quantized():
    q = lobcq_fx.quantize(AdaptiveNorm(), example_inputs=(values(2, 64), values(2, 64, seed=3)))
    assert not q.inventory.left_alone


def test_an_unknown_role_is_refused():
    with pytest.raises(ConfigError, match=r"pattern '@haed' names no role: use one of \['@head'\]"):
        lobcq_fx.LobcqConfig(exclude=["@haed"])
