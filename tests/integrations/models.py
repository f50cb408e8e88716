"""Tiny float models, the folders of quantized ones, and what opens them."""

from __future__ import annotations

import copy

import torch
import transformers

import lobcq_fx
from tests.families import CAUSAL_LMS, ONE_LAYER, VOCABULARY

IDS = torch.tensor([[7, 3, 11, 3, 11, 40, 5, 9], [0, 0, 8, 52, 8, 52, 8, 17]])
MASK = (IDS != 0).long()
GREEDY = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

BERT = transformers.BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=72,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)


def causal_lm(family="llama"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CAUSAL_LMS[family]()).eval()


def uneven():
    """A language model with columns of activations that stand out, in norms and in what attention returns."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**ONE_LAYER, "hidden_size": 64, "head_dim": 16}))
    model.model.layers[0].post_attention_layernorm.weight.data[5] = 25
    model.model.layers[0].self_attn.v_proj.weight.data[3] *= 20
    return model.eval()


def bert(kind=transformers.BertModel):
    torch.manual_seed(0)
    return kind(copy.deepcopy(BERT)).eval()  # what a model notes in its configuration is its own


def batches(count=3):
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(1, VOCABULARY, (2, 16))} for _ in range(count)]


def saved(model, folder, config=None, data=None):
    """The folder of the quantized model."""
    q = lobcq_fx.quantize(model, data, config, static_cache=False)
    q.save_pretrained(folder)
    return folder


@torch.no_grad()
def results(model, ids=IDS):
    """Of the first output, what no padding stands at."""
    output = model(input_ids=ids, attention_mask=(ids != 0).long())[0]
    return output[ids != 0] if output.shape[:2] == ids.shape else output


def opened(folder, kind=transformers.AutoModelForCausalLM, **settings):
    """The model, of which transformers has neither missed nor invented a tensor."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(report.values()), report
    return model
