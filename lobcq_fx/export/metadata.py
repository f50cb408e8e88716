"""What an exported model says of itself, in the metadata of its ONNX file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import onnx

import lobcq_fx
from lobcq_fx.errors import ExportError
from lobcq_fx.export.kept_positions import KEPT
from lobcq_fx.export.schemas import VERSION
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.model import QuantizedModel

MODEL = "model.onnx"

OP_VERSION = "lobcq.op_version"
CALLING = "lobcq.calling"
ONE_SEQUENCE = "lobcq.continues_one_sequence"
"""1: several tokens after a cache are for a batch of one only, as ONNX Runtime's GroupQueryAttention has it."""

LAST_LOGITS_ONLY = "lobcq.last_logits_only"


def is_export(folder: Path) -> bool:
    """Whether `export_onnx` wrote the folder's model."""
    try:
        proto = onnx.load(str(folder / MODEL), load_external_data=False)
    except Exception:  # no file, or none of ONNX's: protobuf's exceptions differ between its implementations
        return False
    return any(entry.key == OP_VERSION for entry in proto.metadata_props)


def metadata_of(q: QuantizedModel, *, one_sequence: bool, last_logits_only: bool) -> dict[str, str]:
    """The version of the operators; for a language model how its graph is called, as JSON, and what it cannot do."""
    metadata = {"lobcq_fx.version": lobcq_fx.__version__, OP_VERSION: str(VERSION)}
    metadata |= {ONE_SEQUENCE: str(int(one_sequence)), LAST_LOGITS_ONLY: str(int(last_logits_only))}
    if isinstance(q.calling, CausalLMCall):
        inputs, guards = q.calling.inputs, q.calling.guards
        if KEPT in inputs:
            inputs, guards = tuple(name for name in inputs if name != KEPT), guards.without(inputs.index(KEPT))
        # All layers share the length of the past, as onnxruntime-genai has it: those that slide a window are whole.
        calling = dataclasses.replace(q.calling, inputs=inputs, guards=guards, cache_dtype="float32", windows=())
        metadata[CALLING] = json.dumps(calling.to_dict())
    return metadata


def check_op_version(metadata: Mapping[str, str]) -> None:
    """Refuse a model whose operators this version does not know.

    Raises:
        ExportError: says what to update.
    """
    version = metadata.get(OP_VERSION)
    if version is None:
        raise ExportError("the ONNX model was not written by lobcq_fx: it has no metadata of ours")
    if int(version) != VERSION:
        remedy = "export it again" if int(version) < VERSION else "update lobcq_fx"
        raise ExportError(
            f"the model uses version {version} of the lobcq operators, lobcq_fx {lobcq_fx.__version__} has version"
            f" {VERSION}: {remedy}"
        )


def causal_lm_call(metadata: Mapping[str, str]) -> CausalLMCall:
    """How an exported language model's graph is called.

    Raises:
        ExportError: the model is none, or its metadata is damaged.
    """
    if CALLING not in metadata:
        raise ExportError("the ONNX model is no causal language model: it cannot generate")
    try:
        return CausalLMCall.from_dict(json.loads(metadata[CALLING]))
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"the ONNX model's metadata {CALLING} is damaged: {error}") from None
