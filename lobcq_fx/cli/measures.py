"""What `lobcq eval` measures on, and what it finds: a section a file, with figures of each model and of both."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn

from lobcq_fx.cli.console import ProgressBars
from lobcq_fx.cli.failures import InputError
from lobcq_fx.cli.inputs import ModelFolder, load_model
from lobcq_fx.errors import LobcqError

Content = TypeVar("Content")


@dataclass(frozen=True)
class Material(Generic[Content]):
    """What a file holds; the file as it was given."""

    source: str
    content: Content


@dataclass(frozen=True)
class Section:
    """kind: which measure. source: the file. models: figures of each model, in order. together: of the two as a pair.

    settings: what the figures depend on, and how much was measured. seconds: what it took, loading excepted.
    """

    kind: str
    source: str
    settings: dict[str, Any]
    models: list[dict[str, Any]]
    seconds: float
    together: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Loaded:
    """A model in memory with its tokenizer. max_length: tokens that it takes, where its configuration says so."""

    name: str
    model: nn.Module
    tokenizer: Any
    max_length: int | None


def loaded(folders: Sequence[ModelFolder], tokenizers: Sequence[Any], progress: ProgressBars) -> list[Loaded]:
    """All of the models, in memory at once.

    Raises:
        LobcqError: one cannot be loaded.
    """
    found: list[Loaded] = []
    for folder, tokenizer in zip(folders, tokenizers, strict=True):
        progress("load", len(found), len(folders))
        name = f"{folder.path.resolve().name} ({'quantized' if folder.quantized else 'float'})"
        found.append(Loaded(name, load_model(folder), tokenizer, folder.max_length))
    progress("load", len(found), len(folders))
    return found


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """To the hundredth."""
        return round(time.perf_counter() - self._start, 2)


@contextmanager
def measuring(source: str) -> Iterator[Stopwatch]:
    """Around a measure on a file.

    Raises:
        InputError: names the file, in place of a ValueError about what it holds.
    """
    try:
        yield Stopwatch()
    except LobcqError:
        raise
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
