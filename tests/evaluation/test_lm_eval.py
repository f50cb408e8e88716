"""lm-evaluation-harness runs quantized models as they are, and finds what `lobcq_fx.evaluation` finds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lobcq_fx
from lobcq_fx.evaluation import last_word, last_word_texts, multiple_choice, perplexity_of_sequences, questions

lm_eval = pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "lm-eval[hf]"')
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # those of a package that we do not develop

QUESTIONS = [
    {"question": "Which keyword leaves a loop?", "choices": ["return nothing at all", "break", "pass"], "answer": 1},
    {"question": "What is imported first?", "choices": ["import", "os", "while index in range(10):"], "answer": 0},
    {"question": "What is None?", "choices": ["a value", "self", "x", "raise ValueError(name)"], "answer": 2},
    {"question": "What does a class have?", "choices": ["def __init__(self, name):", "10"], "answer": 1},
]
TEXTS = [
    "while True:\n    if not line:\n        break\n    if line is None:",
    "class Reader:\n    def read(self, something) -> kangaroo",
    "def __init__(self, name):\n        self.name = self.name",
]
PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
WORD_TASK = """
task: word
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
"""


@pytest.fixture(scope="module")
def quantized(embedded: tuple[nn.Module, Any]) -> nn.Module:
    return lobcq_fx.quantize(embedded[0], static_cache=False)


@pytest.fixture(scope="module")
def harness(quantized: nn.Module, embedded: tuple[nn.Module, Any]) -> Any:
    return HFLM(pretrained=quantized, tokenizer=embedded[1], batch_size=3)


def block(language: str) -> str:
    """The page's only block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the page's task and one of last words, and their data."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "quiz.yaml").write_text(block("yaml"))
    (tmp_path / "tasks" / "word.yaml").write_text(WORD_TASK)
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return tmp_path


def test_local_tasks_come_out_as_ours(
    harness: Any, quantized: nn.Module, embedded: tuple[nn.Module, Any], folder: Path
) -> None:
    manager = TaskManager(include_path="tasks", include_defaults=False)
    theirs = lm_eval.simple_evaluate(harness, tasks=["quiz", "word"], task_manager=manager, bootstrap_iters=0)
    choice, word = (theirs["results"][name] for name in ("quiz", "word"))
    ours = multiple_choice(quantized, embedded[1], questions(folder / "questions.jsonl"), batch_size=2)
    assert (choice["acc,none"], choice["acc_norm,none"]) == (ours.acc, ours.acc_norm)
    assert 0 < ours.acc_norm < ours.acc < 1
    words = last_word(quantized, embedded[1], last_word_texts(folder / "words.jsonl"), batch_size=2)
    assert word["acc,none"] == words.acc
    assert 0 < words.acc < 1
    assert word["perplexity,none"] == pytest.approx(words.perplexity, rel=1e-4)


def test_the_pages_code_runs(quantized: Any, embedded: tuple[nn.Module, Any], folder: Path) -> None:
    quantized.save_pretrained(folder / "quantized", embedded[1])
    names: dict[str, Any] = {}
    exec(block("py"), names)
    ours = multiple_choice(quantized, embedded[1], questions(folder / "questions.jsonl"))
    assert names["found"]["results"]["quiz"]["acc,none"] == ours.acc
    assert names["found"]["results"]["quiz"]["acc_stderr,none"] == pytest.approx(ours.acc_stderr)


def test_generates_and_scores_whole_texts(harness: Any, quantized: nn.Module, embedded: tuple[nn.Module, Any]) -> None:
    tokenizer = embedded[1]
    until = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, until), place) for place, text in enumerate(TEXTS)]
    inputs = tokenizer(TEXTS[2], return_tensors="pt")
    expected = quantized.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert harness.generate_until(asked)[2] == tokenizer.decode(expected).split("\n\n")[0]

    asked = [Instance("loglikelihood_rolling", {}, (text,), place) for place, text in enumerate(TEXTS)]
    # The harness puts the token first, and so does the tokenizer.
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    ours = perplexity_of_sequences(quantized, ids, max_length=512, bos_token_id=tokenizer.bos_token_id)
    total = sum(harness.loglikelihood_rolling(asked))
    assert total == pytest.approx(-ours.negative_log_likelihood * ours.tokens, rel=1e-5)
