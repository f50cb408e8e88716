"""LoRA on a packed base, by PEFT as it is: adapters are trained, saved and loaded; the base's bytes stay."""

from __future__ import annotations

import pytest
import torch
import transformers

from lobcq_fx import LobcqConfig, LobcqQuantizationConfig
from lobcq_fx.errors import LobcqError
from lobcq_fx.modules.lobcq_linear import LobcqLinear
from tests.frontends.test_experts import float_model
from tests.integrations.models import GREEDY, IDS, MASK, causal_lm, opened, results

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks

BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}


def packed(folder, mode="w4a4", make=causal_lm):
    make().save_pretrained(folder)
    return opened(folder, quantization_config=LobcqQuantizationConfig(LobcqConfig(mode=mode)))


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


def with_adapters(model, **settings):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def gradients(model):
    model(**BATCH).loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}


def test_gradients_are_those_on_the_decoded_weights(tmp_path):
    """In W4A16 nothing but weights is rounded: the float model on the decoded ones is the truth."""
    model, reference = packed(tmp_path, "w4a16"), causal_lm()
    for name, one in model.named_modules():
        if isinstance(one, LobcqLinear):
            (weight,) = one.weight.matrices(one.codebooks)
            reference.get_submodule(name).weight.data = weight
    own, true = gradients(with_adapters(model)), gradients(with_adapters(reference))
    assert own.keys() == true.keys()
    assert all("lora_" in name for name in own)
    for name in own:
        torch.testing.assert_close(own[name], true[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("make", [causal_lm, lambda: float_model("mixtral")], ids=["llama", "mixtral"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path, make):
    model = packed(tmp_path / "float", make=make)
    untrained = results(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = with_adapters(model, init_lora_weights=True)
    assert torch.equal(results(adapted), untrained)
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=2e-2)
    losses = []
    for _ in range(8):
        loss = adapted(**BATCH).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    adapted.save_pretrained(tmp_path / "adapters")
    base = opened(tmp_path / "float", quantization_config=LobcqQuantizationConfig())
    now = base.state_dict()
    assert all(torch.equal(bits(state[name]), bits(now[name])) for name in state)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    assert not torch.equal(results(again), untrained)
    assert torch.equal(results(again), results(adapted.eval()))
    assert torch.equal(again.generate(input_ids=IDS, **GREEDY), adapted.generate(input_ids=IDS, **GREEDY))
    with again.disable_adapter():
        assert torch.equal(results(again), untrained)


def test_the_trainer_trains_adapters(tmp_path):
    adapted = with_adapters(packed(tmp_path / "float"))
    before = {name: one.detach().clone() for name, one in adapted.named_parameters() if one.requires_grad}
    arguments = transformers.TrainingArguments(
        tmp_path / "out", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    rows = [{name: tensor[index] for name, tensor in BATCH.items()} for index in (0, 1)]
    transformers.Trainer(adapted, arguments, train_dataset=rows).train()
    after = dict(adapted.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_what_needs_float_weights_is_refused(tmp_path):
    model = packed(tmp_path)
    with pytest.raises(LobcqError, match="not merged into packed weights"):
        with_adapters(model).merge_and_unload()
    for settings in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(LobcqError, match="Remedy: plain LoRA"):
            with_adapters(packed(tmp_path), **settings)


def test_a_packed_convolution_takes_no_adapters(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    settings = {"quantization_config": LobcqQuantizationConfig()}
    model = opened(tmp_path, transformers.CLIPVisionModel, **settings)
    with pytest.raises(LobcqError, match=r"not made for packed convolutions.*target_modules"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["patch_embedding"]))
