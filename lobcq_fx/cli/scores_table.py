"""The results of `lobcq eval` as one table, which 80 columns hold."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lobcq_fx.cli.measures import Section
from lobcq_fx.report import scores


def print_scores(models: list[dict[str, Any]], sections: list[Section]) -> None:
    """On standard output: what is compared, then the table."""
    console = Console(highlight=False)
    names = [f"[bold]{escape(one['model'])}[/] ({scores.weights_of(one)})" for one in models]
    console.print(" against ".join(names), soft_wrap=True)
    table = Table()
    table.add_column("Measure")
    for title in scores.titles(len(models)):
        table.add_column(title, justify="right", no_wrap=True)
    for section in sections:
        figures = section.to_dict()
        source, _, amount = scores.heading(figures).rpartition(": ")
        table.add_row(f"[bold]{escape(source)}[/]: {amount}")
        for title, cells in scores.lines(figures):
            table.add_row(f"  {title}", *cells)
        table.add_section()
    console.print(table)
