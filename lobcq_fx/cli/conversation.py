"""Talk with a language model: turns in the form of its chat template, and a cache that outlives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lobcq_fx.cli.failures import InputError
from lobcq_fx.cli.inputs import ModelFolder
from lobcq_fx.frontends.output_types import CACHE_NAME

Message = dict[str, Any]


def messages_of(prompt: str, system: str | None = None) -> list[Message]:
    """A conversation that begins with a prompt, and with instructions before it if there are any."""
    return [*_instructions(system), {"role": "user", "content": prompt}]


def _instructions(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def check_template(reader: Any, folder: ModelFolder) -> None:
    """See that a tokenizer or processor knows how its model was taught to talk.

    Raises:
        InputError: it has no chat template.
    """
    if not reader.chat_template:
        raise InputError(f"{folder.path} has no chat template: `lobcq generate --prompt TEXT` continues a text")


def templated(reader: Any, messages: list[Message]) -> Mapping[str, Tensor]:
    """What a tokenizer or processor makes of a conversation, input_ids [1, T] first, ready for the model's answer.

    Raises:
        InputError: the template refuses the messages, for example a system message that the model does not know.
    """
    try:
        found: Mapping[str, Tensor] = reader.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # whatever the template's author raises
        raise InputError(f"the chat template refuses this conversation: {error}") from error
    return found


class Conversation:
    """Turns between a person and a model; only what is new is computed, where its cache can be cropped.

    Args:
        model: a language model with `generate()`.
        tokenizer: with a chat template.
        system: instructions before the first turn.
        max_length: tokens that the model can take; None where nothing is known.
        cache: arguments of a `LobcqCache`; None for what the model was quantized for, or floats.
        settings: further arguments of `generate`, `max_new_tokens` among them.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_length: int | None = None,
        cache: dict[str, Any] | None = None,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.max_length, self.system = max_length, system
        config = getattr(model, "lobcq_config", None)
        if cache is None and config is not None and config.kv_cache is not None:
            cache = {"format": config.kv_cache.name, "attention": config.attention}
        self.cache = cache
        self.forget()

    def forget(self) -> None:
        """Begin anew, with the same instructions."""
        self.messages = _instructions(self.system)
        self._cache, self._cached = self._new_cache(), torch.empty(0, dtype=torch.long, device="cpu")

    def answer(self, prompt: str, streamer: Any = None) -> list[int]:
        """Token ids of the model's answer, which becomes part of the conversation.

        Args:
            prompt: what the person says.
            streamer: is given the tokens as they are made.

        Raises:
            InputError: the prompt alone is too long, or the template refuses it.
        """
        self.messages.append({"role": "user", "content": prompt})
        try:
            ids = self._fitting()
            self._keep_common(ids[0])
            ids = ids.to(self.model.device)  # type: ignore[arg-type]
            output = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                **{CACHE_NAME: self._cache, **self.settings},
            )
        except BaseException:
            self._cache, self._cached = self._new_cache(), self._cached[:0]
            self.messages.pop()
            raise
        self._cached = output[0, :-1].cpu()  # the last token's keys and values were not asked for
        new: list[int] = output[0, ids.shape[1] :].tolist()
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(new, skip_special_tokens=True)})
        return new

    def _fitting(self) -> Tensor:
        """The conversation's ids [1, T], the oldest turns dropped where the model cannot take all."""
        first = len(_instructions(self.system))
        while True:
            ids = templated(self.tokenizer, self.messages)["input_ids"]
            needed = ids.shape[1] + self.settings["max_new_tokens"]
            if self.max_length is None or needed <= self.max_length:
                return ids
            if len(self.messages) <= first + 1:
                raise InputError(
                    f"{ids.shape[1]} tokens and {self.settings['max_new_tokens']} to come are more than the"
                    f" {self.max_length} that the model takes: say less, or lower --max-new-tokens"
                )
            del self.messages[first : first + 2]

    def _keep_common(self, ids: Tensor) -> None:
        """Crop the cache to what it has in common with ids [T], all but one of them at most.

        States of recurrent and hybrid models cannot be cropped: those read the conversation anew.
        """
        shorter = min(len(ids) - 1, len(self._cached))
        same = ids[:shorter] == self._cached[:shorter]
        common = shorter if bool(same.all()) else int(same.int().argmin())
        if common == 0 or getattr(self.model, "_is_stateful", False):
            self._cache = self._new_cache()
        elif common < len(self._cached):
            self._cache.crop(common - len(self._cached))  # a negative number of tokens goes, in every release

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        from lobcq_fx import LobcqCache
        from lobcq_fx.frontends.reserving_cache import ReservingCache

        if self.cache is not None:
            return LobcqCache(**self.cache)
        return DynamicCache() if getattr(self.model, "_is_stateful", False) else ReservingCache()
