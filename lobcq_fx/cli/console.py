"""What people see: progress on standard error, tables on standard output, JSON for machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lobcq_fx.cli.json_text import json_text

messages = Console(stderr=True)
"""Progress, notes and errors: standard output stays free for results."""

TITLES = {
    "load": "Load model",
    "trace": "Trace the graph",
    "calibrate": "Observe activations",
    "weigh layers": "Weigh layers",
    "fit codebooks": "Fit codebooks",
    "encode": "Encode weights",
    "save": "Save and verify",
    "convert": "Convert to ONNX",
    "check": "Compare with torch",
    "measure": "Check and time",
}


def speak_for_all(*, first: bool) -> None:
    """Of the processes of one launch the first prints what is of all; the others only what happens to them alone."""
    messages.quiet = not first


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    typer.echo(json_text(values))


class ProgressBars:
    """Bars on standard error, one a step; called as `progress(step, done, total)`, total None where unknown.

    seconds: what each step has taken so far. What passes until a report is of its step, unless that begins just then.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._reported = time.perf_counter()
        self._step: str | None = None
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            console=messages,
        )

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            # A step of unknown length is over once the work is.
            for task in self._bars.tasks:
                if task.total is None:
                    self._bars.update(task.id, total=task.completed)
        self._bars.stop()

    def titled(self, title: str) -> Callable[[str, int, int | None], None]:
        """The same, with one bar of that title whatever the step is called."""
        return lambda _, done, total: self(title, done, total)

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Show `done` of `total` for a step; a new step gets a bar of its own."""
        if step not in self._tasks:
            title = TITLES.get(step, step.capitalize())
            self._tasks[step] = self._bars.add_task(title, total=total)
        self._bars.update(self._tasks[step], completed=done, total=total)
        now, begins = time.perf_counter(), done == 0 and step not in self.seconds
        self.seconds.setdefault(step, 0.0)
        self.seconds[self._step if begins and self._step else step] += now - self._reported
        self._step, self._reported = step, now


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")
