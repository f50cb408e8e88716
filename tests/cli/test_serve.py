"""`lobcq serve` in a process of its own, asked over the loopback interface as OpenAI's client asks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import lobcq_fx
from lobcq_fx.cli.inputs import model_folder
from tests.cli.conftest import Run

openai = pytest.importorskip("openai", reason="the server's packages are not installed")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
NEW = {"max_tokens": 8, "temperature": 0}
PROMPT = "The cat sees"


@pytest.fixture(scope="module")
def folder(quantized_llama: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "q"
    shutil.copytree(quantized_llama[0], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lobcq_fx", "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, "--device", "cpu"], env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        try:
            for _ in range(600):
                assert server.poll() is None, "the server has ended"
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield client
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def of_folder(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def graph(folder: Path) -> torch.nn.Module:
    return lobcq_fx.load(folder)


def written(graph: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: transformers.BatchEncoding) -> str:
    """What the graph of the same folder writes."""
    tokens = graph.generate(**prompt, max_new_tokens=NEW["max_tokens"], do_sample=False)
    return str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_completion_is_the_graphs(client, folder, graph, of_folder):
    answer = client.completions.create(model=str(folder), prompt=PROMPT, **NEW)
    assert answer.choices[0].text == written(graph, of_folder, of_folder(PROMPT, return_tensors="pt"))
    assert answer.usage.completion_tokens == NEW["max_tokens"]


def test_an_answer_comes_piece_by_piece(client, folder, graph, of_folder):
    messages = [{"role": "user", "content": PROMPT}]
    stream = client.chat.completions.create(model=str(folder), messages=messages, stream=True, **NEW)
    pieces = [event.choices[0].delta.content or "" for event in stream if event.choices]
    assert len([piece for piece in pieces if piece]) > 1
    prompt = of_folder.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert "".join(pieces) == written(graph, of_folder, prompt)


def test_no_folder_and_no_such_option(lobcq: Run) -> None:
    assert "there is no folder" in lobcq.refused("serve", "nowhere", code=3)
    assert "--pork" in lobcq("serve", model_folder("default").path, "--pork", code=2).stderr
