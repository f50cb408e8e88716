"""The graphs in docs/passes.md are what its example prints."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lobcq_fx.kernels.bind import weight_layout

PAGE = Path(__file__).parents[2] / "docs" / "passes.md"


def test_the_example_prints_the_documented_graphs(capsys):
    text = PAGE.read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1]
    exec(compile(code, PAGE.name, "exec"), {"__name__": "documented"})
    documented = re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(documented) == 6
    if weight_layout(torch.device("cpu")) is None:
        del documented[-1]  # prepack runs only where there are kernels to pack for
    assert capsys.readouterr().out == "".join(documented)
