"""A quantized Whisper, with Whisper's own `generate()`: languages, time stamps, recordings of any length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from lobcq_fx.frontends.generation_overrides import PREPARE, delegated
from lobcq_fx.frontends.seq2seq_call import Seq2SeqCall
from lobcq_fx.frontends.seq2seq_lm import QuantizedSeq2SeqLM

MODEL_TYPE = "whisper"


class QuantizedWhisper(WhisperGenerationMixin, QuantizedSeq2SeqLM):  # type: ignore[misc]
    """A `QuantizedSeq2SeqLM` that transcribes. Time stamps of words need attention weights, which its graphs lack."""

    @property
    def model(self) -> Any:
        """What Whisper's `generate()` looks at beside the configuration: how many frames become one position."""
        calling = self.calling
        assert isinstance(calling, Seq2SeqCall)
        frames = calling.input_shape[-1]
        assert frames is not None
        first, second = (SimpleNamespace(stride=(n,)) for n in (frames // self.config.max_source_positions, 1))
        return SimpleNamespace(encoder=SimpleNamespace(conv1=first, conv2=second), config=self.config)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As Whisper's."""
        prepare = delegated(MODEL_TYPE, PREPARE, QuantizedWhisper)
        assert prepare is not None
        inputs: dict[str, Any] = prepare(self, input_ids, **kwargs)
        return inputs
