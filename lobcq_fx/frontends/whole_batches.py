"""Models that are graphs generate batch by batch."""

from __future__ import annotations

from typing import Any, NoReturn

from lobcq_fx.errors import CallError


class WholeBatches:
    """Refuses transformers' continuous batching, before its threads start."""

    def init_continuous_batching(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, and with it `generate_batch`.

        Raises:
            CallError: always.
        """
        raise CallError(
            "continuous batching keeps keys and values of many sequences in pages, which a traced graph does not read."
            " Remedy: generate() with a padded batch; or transformers.AutoModelForCausalLM.from_pretrained(folder),"
            " whose modules do what the float model's do"
        )
