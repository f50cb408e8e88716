"""transformers' Trainer and pipelines on quantized models, as graphs and as modules."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import lobcq_fx
from tests.families import VOCABULARY, fake_quantized, quantized_layers
from tests.integrations.models import bert, causal_lm, opened, saved

ROWS = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
TEXT = "w5 w9 w3 w40"


@pytest.fixture(scope="module")
def tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    words_alone = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    words_alone.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words_alone, pad_token="[PAD]", unk_token="[UNK]")


def trainer_of(model, folder):
    arguments = transformers.TrainingArguments(folder, per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    return transformers.Trainer(model, arguments, eval_dataset=[{"input_ids": row, "labels": row} for row in ROWS])


@torch.no_grad()
def test_the_trainer_evaluates_and_predicts_as_with_the_fake_quantized_model(tmp_path):
    model = causal_lm()
    q = lobcq_fx.load(saved(model, tmp_path / "q"))
    found = {}
    with fake_quantized(model, quantized_layers(q), exact=True):
        for name, one in (("original", model), ("quantized", q)):
            trainer = trainer_of(one, tmp_path / name)
            found[name] = trainer.predict(trainer.eval_dataset), trainer.evaluate()["eval_loss"]
    (expected, loss), (predicted, evaluated) = found["original"], found["quantized"]
    logits, others = predicted.predictions, expected.predictions
    assert logits.shape == (*ROWS.shape, VOCABULARY)
    torch.testing.assert_close(torch.from_numpy(logits), torch.from_numpy(others))
    assert predicted.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    assert evaluated == pytest.approx(loss, rel=1e-5)


def test_modules_without_adapters_are_not_for_the_trainer(tmp_path):
    """transformers takes no quantized class of its own without them, not even to evaluate it."""
    model = opened(saved(causal_lm(), tmp_path / "q"))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer_of(model, tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("door", ["graph", "modules"])
@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("feature-extraction", transformers.BertModel),
        ("text-classification", transformers.BertForSequenceClassification),
    ],
)
def test_pipelines_of_encoders(tmp_path, tokenizer, task, kind, door):
    folder = saved(bert(kind), tmp_path / "q")
    model = lobcq_fx.load(folder) if door == "graph" else opened(folder, kind)
    run = transformers.pipeline(task, model=model, tokenizer=tokenizer)
    output = model(**tokenizer(TEXT, return_tensors="pt"))[0]
    (found,) = run(TEXT)
    if task == "feature-extraction":
        torch.testing.assert_close(torch.tensor(found), output[0])
    else:
        assert found["score"] == pytest.approx(float(output[0].softmax(-1).max()), rel=1e-5)
        assert found["label"] == model.config.id2label[int(output[0].argmax())]
