"""export_onnx(): a quantized model in, a folder with an ONNX model out."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
from torch import fx

from lobcq_fx.errors import ExportError
from lobcq_fx.export.attention import ATTENTION, UseGroupQueryAttention
from lobcq_fx.export.convert import to_onnx
from lobcq_fx.export.flat_module import FlatModule
from lobcq_fx.export.genai import GENAI_CONFIG, write_genai_files
from lobcq_fx.export.library import LIBRARY_COPY, copy_library, get_library_path
from lobcq_fx.export.matmulnbits import LowerToMatMulNBits, UseFloatActivations
from lobcq_fx.export.metadata import MODEL, is_export, metadata_of
from lobcq_fx.export.schemas import DOMAIN
from lobcq_fx.export.self_check import Differences, check_sessions
from lobcq_fx.export.signature import signature_of
from lobcq_fx.export.stored_module import stored_module
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.recurrent_call import RecurrentCall
from lobcq_fx.frontends.seq2seq_call import Seq2SeqCall
from lobcq_fx.model import QuantizedModel
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.passes.group_query_heads import GroupQueryHeads
from lobcq_fx.passes.infra import Sequential
from lobcq_fx.refusal import Refusal
from lobcq_fx.storage.atomic_folder import replace_folder

DATA = f"{MODEL}.data"

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
PARTS = (DATA, GENAI_CONFIG, LIBRARY_COPY, "config.json", "generation_config.json", *TOKENIZER_FILES)
"""Files that belong to one export, besides the model's."""

EXTERNAL_FROM = 1 << 20
"""Bytes of weights from which on they lie in a file of their own, which runtimes map into memory instead of copying."""

Target = Literal["custom", "matmulnbits"]
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class ExportSummary:
    """What was written.

    nodes: how many of each type, `domain::type` outside ONNX's own. library_nodes: those that the op library makes
    fast. size: bytes of graph and weights on disk. differences: what the self-check found. fused_attentions: how many
    became ONNX Runtime's own; unfused_attentions: for each that did not, why. left_in_float: layers that are not
    quantized, and why. genai: None where onnxruntime-genai can serve the folder, else why it cannot.
    """

    path: Path
    nodes: dict[str, int]
    library_nodes: int
    size: int
    differences: Differences
    fused_attentions: int
    unfused_attentions: tuple[Refusal, ...]
    left_in_float: tuple[Refusal, ...]
    genai: str | None


def write_folder(
    q: QuantizedModel,
    out: Path,
    example_inputs: Any,
    *,
    target: Target,
    fuse: bool,
    last_logits_only: bool,
    tokenizer: Any,
    include_library: bool,
    progress: Progress,
) -> ExportSummary:
    """See `lobcq_fx.export.export_onnx`."""
    _check_request(q, target, include_library=include_library)
    signature = signature_of(q, example_inputs)
    progress("convert", 0, None)
    graph = stored_module(q, last_logits_only=last_logits_only)
    if target == "matmulnbits":
        UseFloatActivations()(graph)
    reference = copy.deepcopy(graph)
    if target == "matmulnbits":
        Sequential((LowerToMatMulNBits(q.graph_module), EliminateDeadCode()))(graph)
    fused, unfused = _fuse_attention(graph, q) if fuse else (0, ())
    model = to_onnx(FlatModule(graph), signature, fuse=fuse)
    model.metadata_props.update(metadata_of(q, one_sequence=bool(fused), last_logits_only=last_logits_only))
    progress("convert", 1, 1)
    with replace_folder(out, is_export, PARTS.__contains__) as folder:
        size = _save(model, folder)
        genai = _write_causal_lm_files(q, folder, tokenizer, include_library=include_library)
        progress("check", 0, None)
        onnx.checker.check_model(str(folder / MODEL), full_check=True)
        differences = check_sessions(folder / MODEL, signature, reference)
        progress("check", 1, 1)
    nodes = _count(model)
    return ExportSummary(
        path=out,
        nodes=nodes,
        library_nodes=sum(count for name, count in nodes.items() if name.startswith(f"{DOMAIN}::")),
        size=size,
        differences=differences,
        fused_attentions=fused,
        unfused_attentions=unfused,
        left_in_float=tuple(Refusal("quantize", record.layer, str(record.reason)) for record in q.inventory.left_alone),
        genai=genai,
    )


def _check_request(q: QuantizedModel, target: str, *, include_library: bool) -> None:
    """Refuse before the long work what would fail after it."""
    if q.device.type != "cpu":
        raise ExportError(f"the model is on {q.device}: export it from the CPU, q.to('cpu')")
    if isinstance(q.calling, RecurrentCall):
        raise ExportError(
            "the model keeps states of a fixed size beside or instead of keys and values, and its graph runs their"
            " scans as operators that ONNX does not have. Remedy: wrap the float model in a torch.nn.Module that calls"
            " it with use_cache=False and returns the logits, quantize that with example_inputs, and export it for"
            " prompts of that length"
        )
    if isinstance(q.calling, Seq2SeqCall):
        raise ExportError(
            f"{(q.config.architectures or ['the model'])[0]} is an encoder-decoder, of which no ONNX model is made."
            " Remedy: quantize its encoder alone, lobcq_fx.quantize(model.get_encoder()), and export that"
        )
    if target not in ("custom", "matmulnbits"):
        raise ExportError(f"target is {target!r}: it may be 'custom' or 'matmulnbits'")
    if include_library and target != "custom":
        raise ExportError(f"target {target!r} needs no op library: leave include_library out")
    if include_library:
        get_library_path()


def _fuse_attention(graph: fx.GraphModule, q: QuantizedModel) -> tuple[int, tuple[Refusal, ...]]:
    """How many of a language model's attentions became ONNX Runtime's own, and why each other did not."""
    if not isinstance(q.calling, CausalLMCall):
        return 0, ()
    GroupQueryHeads()(graph)
    before = len(list(graph.graph.find_nodes(op="call_function", target=ATTENTION)))
    refusals = UseGroupQueryAttention(q.calling)(graph).refusals
    return before - len(refusals), refusals


def _save(model: ir.Model, folder: Path) -> int:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    external = sum(tensor.nbytes for tensor in tensors if tensor is not None) >= EXTERNAL_FROM
    ir.save(model, folder / MODEL, external_data=DATA if external else None)
    return sum(path.stat().st_size for path in folder.iterdir())


def _write_causal_lm_files(q: QuantizedModel, folder: Path, tokenizer: Any, *, include_library: bool) -> str | None:
    library = copy_library(folder) if include_library else None
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if q.config is not None:
        q.config.save_pretrained(folder)
    if not isinstance(q.calling, CausalLMCall):
        return "it is no causal language model"
    q.generation_config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    return write_genai_files(folder, q, library)


def _count(model: ir.Model) -> dict[str, int]:
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.all_nodes())
    counts = Counter(names)
    return dict(sorted(counts.items(), key=lambda item: (not item[0].startswith(DOMAIN), -item[1], item[0])))
