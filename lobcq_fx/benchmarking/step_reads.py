"""What a decode step has to read of a model's memory: with the speed of memory the bound on how fast it can be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lobcq_fx.benchmarking.generating import generate
from lobcq_fx.frontends.output_types import CACHE_NAME, CACHE_PARAMS

LOOKED_UP = ("aten.embedding", "aten.index", "aten.index_select", "aten.gather")
"""These read single rows of a table."""

PROMPT, FIRST_STEP, SECOND_STEP = range(3)
"""What `generate()` shows a streamer of two steps."""


def bytes_of_a_step(model: nn.Module, ids: Tensor) -> int:
    """Of all parameters and buffers that the step behind a prompt [B, T] multiplies with, each once.

    Not of tables that it only looks rows up in. Of stacked experts whose kernel is given the whole stack, all.
    """
    recorder = _Recorder(model)
    generate(model, ids, 2, streamer=recorder)
    return sum(recorder.read.values())


def bytes_of_states(model: Any, ids: Tensor) -> int:
    """Of keys and values, or whatever else the model keeps of a prompt [B, T] for the next step."""
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    )
    cache = output.get(CACHE_NAME) or output.get(CACHE_PARAMS)
    tensors = {id(one): one.nbytes for layer in getattr(cache, "layers", ()) for one in _tensors(vars(layer))}
    return sum(tensors.values())


def _tensors(values: Any) -> Iterator[Tensor]:
    return (one for one in tree_leaves(values) if isinstance(one, Tensor))


class _Recorder(TorchDispatchMode):
    """The model's tensors that operators are called with between the first and the second new token.

    read: bytes by address and size.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._storages = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
        self._shown = PROMPT
        self.read: dict[tuple[int, int], int] = {}

    def put(self, _value: Tensor) -> None:
        """As a streamer's."""
        if self._shown == FIRST_STEP:
            self.__enter__()
        elif self._shown == SECOND_STEP:
            self.__exit__(None, None, None)
        self._shown += 1

    def end(self) -> None:
        """As a streamer's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view and str(func.overloadpacket) not in LOOKED_UP:
            for one in _tensors((args, kwargs)):
                if one.untyped_storage().data_ptr() in self._storages:
                    self.read[one.data_ptr(), one.nbytes] = one.nbytes
        return func(*args, **kwargs)
