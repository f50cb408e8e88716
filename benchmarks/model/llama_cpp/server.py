"""Serves llama.cpp over a pipe: `python -m benchmarks.model.llama_cpp.server`, in llama.cpp's environment.

A request is a line of JSON, {"call": name, ...}; the answer is one too, {"ok": what it found} or {"error": text}.
Seconds are measured here, so that the pipe costs nobody anything. Contexts have llama.cpp's own defaults.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np

from benchmarks.model.llama_cpp.gguf_file import write_gguf

KINDS = {
    "Q4_0": (api.LLAMA_FTYPE_MOSTLY_Q4_0, api.GGML_TYPE_Q4_0),
    "Q4_K": (api.LLAMA_FTYPE_MOSTLY_Q4_K_S, api.GGML_TYPE_Q4_K),
}
CELLS = 256
"""The cache of a sequence is a multiple of so many tokens."""

LEAST_LEVEL = 3
"""Of what llama.cpp says: warnings and errors. By default it says much more."""

Ids = list[list[int]]
"""A prompt for each sequence, all of one length."""


class Context:
    """Some sequences of a model, each with a prompt and what follows it."""

    def __init__(self, model: Any, threads: int, sequences: int, tokens: int) -> None:
        settings = api.llama_context_default_params()
        settings.n_ctx = sequences * CELLS * -(-tokens // CELLS)
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        self.handle = api.llama_init_from_model(model, settings)
        if not self.handle:
            raise RuntimeError(f"no context for {sequences} sequences of {tokens} tokens")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.most = settings.n_batch
        self.memory = api.llama_get_memory(self.handle)
        self.batch = api.llama_batch_init(self.most, 0, 1)
        self.prompts: Ids = []
        self.first: list[int] = []

    def close(self) -> None:
        """Give its memory back."""
        api.llama_batch_free(self.batch)
        api.llama_free(self.handle)

    def prefill(self, prompts: Ids) -> np.ndarray[Any, Any]:
        """Read a prompt for each sequence, one after the other; the logits behind each, [B, V].

        `first` are the likeliest tokens behind them.
        """
        api.llama_memory_clear(self.memory, False)
        self.prompts, rows = prompts, []
        for sequence, ids in enumerate(prompts):
            for start in range(0, len(ids), self.most):
                part = ids[start : start + self.most]
                wanted = [start + place == len(ids) - 1 for place in range(len(part))]
                self._decode(part, range(start, start + len(part)), [sequence] * len(part), wanted)
            rows.append(self._logits(len(part) - 1).copy())
        self.first = [int(row.argmax()) for row in rows]
        return np.stack(rows)

    def steps(self, count: int) -> list[list[int]]:
        """The likeliest tokens behind the prompts and the first ones, [count][B]."""
        found, many = [self.first], len(self.prompts)
        position = len(self.prompts[0])
        for place in range(count):
            self._decode(found[-1], [position + place] * many, range(many), [True] * many)
            found.append([int(self._logits(sequence).argmax()) for sequence in range(many)])
        return found[1:]

    def rewind(self) -> None:
        """Back to the prompts."""
        for sequence, ids in enumerate(self.prompts):
            api.llama_memory_seq_rm(self.memory, sequence, len(ids), -1)

    def _decode(self, ids: Any, positions: Any, sequences: Any, wanted: Any) -> None:
        batch = self.batch
        batch.n_tokens = len(ids)
        for place, (token, position, sequence, logits) in enumerate(
            zip(ids, positions, sequences, wanted, strict=True)
        ):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, logits
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        if api.llama_decode(self.handle, batch):
            raise RuntimeError(f"llama_decode failed at position {positions[0]}")

    def _logits(self, place: int) -> np.ndarray[Any, Any]:
        """[V]; those of the next call are written over it."""
        return np.ctypeslib.as_array(api.llama_get_logits_ith(self.handle, place), shape=(self.vocabulary,))


class Server:
    """A model, and a context for each number of sequences and tokens that was asked for."""

    def __init__(self) -> None:
        self.model, self.threads, self.contexts = None, 1, dict[tuple[int, int], Context]()

    def versions(self) -> dict[str, str]:
        """Of the binding, and what its llama.cpp was compiled for."""
        return {"llama-cpp-python": version("llama-cpp-python"), "system": api.llama_print_system_info().decode()}

    def write(self, folder: str, target: str) -> None:
        """A model of transformers as a GGUF file in fp32."""
        write_gguf(Path(folder), Path(target))

    def quantize(self, source: str, target: str, kind: str) -> None:
        """All matmuls' weights in one format, the head's too; the embedding's table, which is no matmul's, in fp32."""
        settings = api.llama_model_quantize_default_params()
        settings.ftype, settings.output_tensor_type = KINDS[kind]
        settings.token_embedding_type, settings.pure = api.GGML_TYPE_F32, True
        if api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)):
            raise RuntimeError(f"llama_model_quantize cannot make {target} of {source}")

    def open(self, path: str, threads: int) -> None:
        """Load a model, in place of the one before."""
        for context in self.contexts.values():
            context.close()
        self.contexts, self.threads = {}, threads
        if self.model:
            api.llama_model_free(self.model)
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")

    def logits(self, prompts: Ids) -> list[list[float]]:
        """Behind each prompt, [B][V]."""
        found: list[list[float]] = self._context(len(prompts), len(prompts[0])).prefill(prompts).tolist()
        return found

    def prefill(self, prompts: Ids, warm: Ids) -> float:
        """Seconds of a prompt, behind another that is not timed."""
        context = self._context(len(prompts), len(prompts[0]))
        context.prefill(warm)
        start = time.perf_counter()
        context.prefill(prompts)
        return time.perf_counter() - start

    def decode(self, prompts: Ids, steps: int) -> dict[str, Any]:
        """Seconds a step behind prompts, and its tokens [steps][B]; a step before it is not timed."""
        context = self._context(len(prompts), len(prompts[0]) + steps)
        if context.prompts != prompts:
            context.prefill(prompts)
        context.steps(1)
        context.rewind()
        start = time.perf_counter()
        found = context.steps(steps)
        seconds = (time.perf_counter() - start) / steps
        context.rewind()
        return {"seconds": seconds, "tokens": found}

    def generate(self, prompts: Ids, steps: int, warm: Ids) -> dict[str, Any]:
        """New tokens [steps][B], seconds until the first, and of the rest; a short prompt before it is not timed."""
        context = self._context(len(prompts), len(prompts[0]) + steps)
        context.prefill(warm)
        start = time.perf_counter()
        context.prefill(prompts)
        between = time.perf_counter()
        rest = context.steps(steps - 1)
        end = time.perf_counter()
        context.rewind()
        return {"first_seconds": between - start, "rest_seconds": end - between, "tokens": [context.first, *rest]}

    def _context(self, sequences: int, tokens: int) -> Context:
        key = sequences, tokens
        if key not in self.contexts:
            self.contexts[key] = Context(self.model, self.threads, *key)
        return self.contexts[key]


CALLS = ("versions", "write", "quantize", "open", "logits", "prefill", "decode", "generate")


@api.llama_log_callback
def log(level: int, text: bytes, _data: Any) -> None:
    """Warnings and errors, to standard error."""
    if level in (LEAST_LEVEL, LEAST_LEVEL + 1):
        os.write(2, text)


def main() -> None:
    """Answer until there are no more requests."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever llama.cpp prints goes to standard error
    api.llama_log_set(log, ctypes.c_void_p())
    api.llama_backend_init()
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        call = request.pop("call")
        try:
            if call not in CALLS:
                raise ValueError(f"there is no call {call!r}")
            answer = {"ok": getattr(server, call)(**request)}
        except Exception as error:  # what it was belongs to who asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
