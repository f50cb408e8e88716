"""The graphs in docs/passes.md are what its example prints."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "passes.md"


def test_the_example_prints_the_documented_graphs(capsys):
    text = PAGE.read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1]
    exec(compile(code, PAGE.name, "exec"), {"__name__": "documented"})
    documented = re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(documented) == 5
    assert capsys.readouterr().out == "".join(documented)
