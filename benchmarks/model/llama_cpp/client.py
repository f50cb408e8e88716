"""A model in llama.cpp, in a process of its own: what server.py measures of it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.benchmarking.generating import WARM_PROMPT, Generated
from lobcq_fx.benchmarking.race import SETTLE_SECONDS

ROOT = Path(__file__).parents[3]
PACKAGES = ("llama_cpp", "gguf", "safetensors")


def why_absent(python: Path | None) -> str | None:
    """Why an interpreter does not run llama.cpp; None where it does."""
    if python is None:
        return "no --llama-cpp PYTHON was given, an interpreter that imports " + ", ".join(PACKAGES)
    command = [str(python), "-c", f"import {', '.join(PACKAGES)}"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python}: {error.strerror}"
    return None if tried.returncode == 0 else f"{python}: {tried.stderr.strip().splitlines()[-1]}"


class LlamaCpp:
    """server.py, started in llama.cpp's environment. Use it in a `with` statement, or until this process ends."""

    def __init__(self, python: Path) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.model.llama_cpp.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def close(self) -> None:
        """End the process: it ends where there are no more requests."""
        self._process.communicate()
        self._errors.close()

    def call(self, name: str, **values: Any) -> Any:
        """What the server's call of that name returns.

        Raises:
            RuntimeError: it failed, or the process died; with the last that it printed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": name, **values}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the process died"}')
        if "error" in answer:
            self._errors.seek(0)
            said = "".join(self._errors.readlines()[-5:])
            raise RuntimeError(f"llama.cpp, {name}: {answer['error']}\n{said}")
        return answer["ok"]


class LlamaCppModel:
    """A GGUF file that is loaded."""

    def __init__(self, process: LlamaCpp, path: Path, threads: int) -> None:
        self.process = process
        process.call("open", path=str(path), threads=threads)
        self._decoded: dict[tuple[int, ...], Any] = {}

    def logits(self, ids: Tensor) -> Tensor:
        """Behind ids [B, T], [B, V]."""
        return torch.tensor(self.process.call("logits", prompts=ids.tolist()))

    def prefill_seconds(self, ids: Tensor) -> float:
        """Of reading a prompt [1, T]."""
        found: float = self._timed("prefill", prompts=ids.tolist(), warm=ids[:, :WARM_PROMPT].tolist())
        return found

    def decode_seconds(self, ids: Tensor, steps: int) -> float:
        """Of a step behind ids [B, T], the mean of some; ends the benchmark if it chose other tokens than before."""
        found = self._timed("decode", prompts=ids.tolist(), steps=steps)
        if self._decoded.setdefault((*ids.shape, steps), found["tokens"]) != found["tokens"]:
            raise SystemExit("llama.cpp chose other tokens than in the round before, so no speed for it")
        seconds: float = found["seconds"]
        return seconds

    def generate(self, ids: Tensor, steps: int) -> Generated:
        """The likeliest `steps` tokens behind ids [1, T]."""
        warm = ids[:, :WARM_PROMPT].tolist()
        found = self._timed("generate", prompts=ids.tolist(), steps=steps, warm=warm)
        return Generated(torch.tensor(found["tokens"]).t(), found["first_seconds"], found["rest_seconds"])

    def _timed(self, name: str, **values: Any) -> Any:
        """A call of the server's, when the threads of whoever had the turn before have stopped spinning."""
        time.sleep(SETTLE_SECONDS)
        return self.process.call(name, **values)
