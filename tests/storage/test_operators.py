"""The list of operators that a saved graph may call: what is on it, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import lobcq_fx
from benchmarks.quality.operators import CAPTURED_ALL_THE_SAME, CHECKED, IN_PLACE, by_rule, denial
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.graph_json import graph_from_json, graph_to_json
from lobcq_fx.storage.operators import FILE, allowed
from tests.storage.test_crafted import INPUT, OUTPUT, X, call

FAMILIES = Path(__file__).parents[2] / "benchmarks" / "results" / "families.json"


def overload_of(name):
    _, namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def test_the_file_is_sorted_and_holds_what_the_rule_gives():
    names = FILE.read_text(encoding="utf-8").split()
    assert names == sorted(set(names))
    missing = {name for name in by_rule() - allowed() if torch.__version__.startswith("2.13")}
    assert not missing, "run python -m benchmarks.quality.operators"


def test_every_family_s_operators_are_on_it():
    families = json.loads(FAMILIES.read_text(encoding="utf-8"))["families"]
    called = {name for row in families.values() for name in row.get("operators", ()) if name.startswith("ops.")}
    assert len(called) > 80
    assert called <= allowed()


def test_nothing_on_it_is_denied_or_writes_unless_it_is_said_to():
    for name in allowed():
        assert denial(name) is None or name in (*CAPTURED_ALL_THE_SAME, *CHECKED), name
        if name.startswith("ops.aten."):
            mutable = overload_of(name)._schema.is_mutable
            assert not mutable or name.removeprefix("ops.aten.") in IN_PLACE, name


OTHERS = """
set_.source_Storage as_strided.default from_file.default save.default _sparse_csr_tensor_unsafe.default
manual_seed.default seed.default rand.default randn_like.default bernoulli.p normal_.default
empty.memory_format empty_strided.default resize_.default repeat_interleave.self_Tensor embedding_bag.default
embedding_bag.padding_idx _embedding_bag.default lstm.data gru.data lstm_cell.default _grouped_mm.default
_local_scalar_dense.default item.default nonzero.default native_layer_norm.default
_native_batch_norm_legit_no_training.default add.out cat.names data.default
_scaled_dot_product_flash_attention_for_cpu.default unsafe_split.Tensor _unsafe_index.Tensor
_foreach_add.Scalar quantize_per_tensor.default record_stream.default mkldnn_convolution.default
"""


@pytest.mark.parametrize("name", OTHERS.split())
def test_not_on_it(name):
    assert f"ops.aten.{name}" not in allowed()
    with pytest.raises(CheckpointError, match=r"which is not among the operators a saved graph may call"):
        graph_from_json([INPUT, call(f"ops.aten.{name}", X), OUTPUT])


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.layer = nn.EmbeddingBag(10, 64), nn.Linear(64, 32)

    def forward(self, ids):
        return self.layer(self.bag(ids))


def test_a_model_that_calls_another_one_is_refused_when_it_is_saved(tmp_path):
    q = lobcq_fx.quantize(Bags().eval(), example_inputs=torch.tensor([[1, 2, 3], [4, 5, 6]]))
    message = r"cannot save node '\w+': it calls ops\.aten\.embedding_bag.*, which is not among .*: torch .* Remedy: "
    with pytest.raises(CheckpointError, match=message):
        q.save_pretrained(tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_ops_of_others_are_refused_by_name():
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.prims.sin.default, (graph.placeholder("x"),)))
    with pytest.raises(CheckpointError, match=r"cannot save node 'sin_default': it calls ops\.prims\.sin\.default"):
        graph_to_json(graph)
