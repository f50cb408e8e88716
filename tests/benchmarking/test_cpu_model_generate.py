"""The benchmark of plain `generate()`: it times what chooses the loop's tokens, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.model.plain_generate import CALL, LOOP, generate_columns, race_generate
from tests.families import quantized_causal_lm

IDS = torch.tensor([[7, 3, 11, 3, 11, 40]])


def test_both_ways_are_timed_for_float_and_quantized_models():
    model, q = quantized_causal_lm("llama")
    times = race_generate({"float": model, "quantized": q}, IDS, steps=4, rounds=2)
    assert {name: [len(times[name][way]) for way in (CALL, LOOP)] for name in times} == {
        "float": [2, 2],
        "quantized": [2, 2],
    }


def test_a_generate_that_chooses_other_tokens_is_not_timed():
    _, q = quantized_causal_lm("llama")
    other = copy.deepcopy(q)
    other.generation_config.suppress_tokens = q.generate(IDS, max_new_tokens=1, do_sample=False)[0, -1:].tolist()
    with pytest.raises(SystemExit, match=r"quantized generate\(\): from new token 0 on"):
        race_generate({"quantized": other}, IDS, steps=4, rounds=1)


def test_columns():
    times = {
        "float": {CALL: [(2.0, 6.0), (4.0, 4.0), (2.0, 2.0)], LOOP: [(1.0, 3.0)] * 3},
        "ours": {CALL: [(1.0, 1.0), (2.0, 2.0), (0.5, 0.5)], LOOP: [(0.5, 0.5)] * 3},
        "llama.cpp Q4_0": {CALL: [(1.0, 3.0)] * 3},
    }
    columns = generate_columns(times, "ours", "float", length=64, steps=16)
    assert columns == {
        "generate_tokens_per_second": 8.0,
        "generate_ratio": 4.0,
        "generate_prefill_tokens_per_second": 64.0,
        "generate_decode_tokens_per_second": 15.0,
        "generate_prefill_ratio": 2.0,
        "generate_decode_ratio": 4.0,
        "generate_prefill_x_llama.cpp Q4_0": 1.0,
        "generate_decode_x_llama.cpp Q4_0": 3.0,
        "generate_to_loop": 2.0,
    }
    assert "generate_to_loop" not in generate_columns(times, "llama.cpp Q4_0", "float", length=64, steps=16)
