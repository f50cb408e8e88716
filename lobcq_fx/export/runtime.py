"""An exported language model in ONNX Runtime, with Hugging Face's `generate()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel

from lobcq_fx.errors import CallError, ExportError
from lobcq_fx.export.library import register
from lobcq_fx.export.metadata import LAST_LOGITS_ONLY, MODEL, ONE_SEQUENCE, causal_lm_call, check_op_version
from lobcq_fx.frontends.causal_lm import CausalLMForward, graph_config
from lobcq_fx.frontends.causal_lm_call import CausalLMCall

DTYPES = {"tensor(int64)": torch.int64, "tensor(float)": torch.float32}
"""Of the inputs that exported language models have."""


class _SessionModel:
    """Calls an ONNX Runtime session as the model that it was exported from was called."""

    session: ort.InferenceSession
    calling: CausalLMCall
    metadata: Mapping[str, str]

    def forward(self, **call: Any) -> Any:
        """The output class of the float model.

        Raises:
            CallError: the exported graph cannot serve the call.
        """
        inputs = self.calling.flatten((), call)
        batch, length = inputs[0].shape
        cached = inputs[-1].shape[2]
        if self.metadata[ONE_SEQUENCE] == "1" and batch > 1 and length > 1 and cached:
            raise CallError(
                f"{length} tokens after a cache of {cached} for a batch of {batch}: ONNX Runtime's GroupQueryAttention"
                " takes them for a batch of one. Remedy: one token at a time, or an export with fuse=False"
            )
        kept = call.get("logits_to_keep")
        if self.metadata[LAST_LOGITS_ONLY] == "1" and (
            call.get("labels") is not None or isinstance(kept, Tensor) or (kept or 0) > 1
        ):
            raise CallError("the graph returns the logits of the last position: export without last_logits_only")
        return self.calling.unflatten(self.run(inputs), (), call)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The graph's outputs, fp32, for its inputs in order."""
        feeds = {
            value.name: x.to(DTYPES[value.type]).contiguous().numpy()
            for value, x in zip(self.session.get_inputs(), inputs, strict=True)
        }
        return [torch.from_numpy(output) for output in self.session.run(None, feeds)]


class OnnxCausalLM(CausalLMForward, _SessionModel, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A folder written by `export_onnx`, called like the quantized causal language model, `generate()` included.

    session: the ONNX Runtime session. calling: how a call of the model becomes a call of the graph.
    """

    def __init__(self, directory: str | Path, *, use_library: bool = True, threads: int = 0) -> None:
        """Open the folder.

        Args:
            directory: the folder.
            use_library: run the lobcq operators by the op library, not by their function bodies.
            threads: of the session; 0 takes one for each core.

        Raises:
            ExportError: the folder is not of `export_onnx`, of another version, or this ONNX Runtime is too old.
            LobcqError: there is no op library.
        """
        directory = Path(directory)
        if not (directory / MODEL).is_file():
            raise ExportError(f"{directory} holds no {MODEL}: pass a folder that export_onnx wrote")
        session = _session(directory / MODEL, use_library=use_library, threads=threads)
        metadata = session.get_modelmeta().custom_metadata_map
        check_op_version(metadata)
        calling = causal_lm_call(metadata)
        super().__init__(graph_config(AutoConfig.from_pretrained(directory)))
        self.generation_config = GenerationConfig.from_pretrained(directory)
        self.session, self.calling, self.metadata = session, calling, metadata

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """fp32."""
        return torch.float32


def _session(path: Path, *, use_library: bool, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as well
    if use_library:
        register(options)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise ExportError(
            f"ONNX Runtime {ort.__version__} cannot open {path}: {error}. Remedy: a newer onnxruntime; before 1.22, an"
            " export with fuse=False"
        ) from error
