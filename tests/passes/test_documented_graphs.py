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
    section = text[: text.index("## Fused on a GPU")]
    documented = re.findall(r"^```text\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert len(documented) == 7
    if weight_layout(torch.device("cpu")) is None:
        del documented[-2:]  # these passes run only where there are kernels to pack for
    assert capsys.readouterr().out == "".join(documented)
