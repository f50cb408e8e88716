"""Tables as the pages have them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def keep_page(page: Path, sections: Mapping[str, str], script: str, description: str | None) -> None:
    """The command line of a script that fills a page: rewrites it, or with --check exits with 1 if it differs.

    Every `<!-- name -->` ... `<!-- /name -->` of the page, of which there must be one, gets the section of that name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before = after = page.read_text(encoding="utf-8")
    for name, content in sections.items():
        section = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        replacement = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
        after, count = section.subn(lambda _, new=replacement: new, after)
        if count != 1:
            sys.exit(f"{page.name} has {count} sections between <!-- {name} --> and <!-- /{name} -->, not one")
    if not check:
        page.write_text(after, encoding="utf-8")
    elif before != after:
        sys.exit(f"{page.name} does not show what benchmarks/results has: run python -m benchmarks.pages.{script}")
