"""Every Python block of README and docs, and the notebook, run as they stand, each in a process of its own; a block in
the folder of those before it.

The README comes first: other pages begin with what its example saved.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lobcq_fx

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match[1], id=f"{page.name}:{line}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


def run(code, folder, errors):
    """In this process; what it prints as errors goes to a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(folder)
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def processes():
    """Forks of a process that has imported what all blocks import, which takes most of their time, and run nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama", "lobcq_fx.pipeline", "lobcq_fx.loading"])
    return context


@pytest.mark.parametrize("code", list(blocks()))
def test_python_block_runs(code, folder, processes, tmp_path):
    process = processes.Process(target=run, args=(code, folder, tmp_path / "errors"), daemon=True)
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()


def test_the_notebook_runs_from_top_to_bottom(folder):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "it was not run whole"
    source = "\n\n".join("".join(cell["source"]) for cell in code)
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "equal to the last bit: True" in done.stdout


def test_the_reference_is_built_without_warnings(folder):
    """`make reference`, by its own command."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (public,) = re.findall(r"^PUBLIC := (.*)$", makefile, re.MULTILINE)
    (arguments,) = re.findall(r"/pdoc (.*)$", makefile, re.MULTILINE)
    command = [sys.executable, "-W", "error", "-m", "pdoc", *shlex.split(arguments.replace("$(PUBLIC)", public))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    page = (folder / "build" / "reference" / "lobcq_fx.html").read_text(encoding="utf-8")
    for name in lobcq_fx.__all__:
        assert f'id="{name}"' in page, name
    assert "<strong>calibration_data:</strong>" in page, "arguments are a list"


def test_the_pages_have_blocks_to_run():
    assert list(blocks())


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "page", ["readme", "accuracy", "gpu_kernels", "families", "reliability", "experts", "integrations", "scaling"]
)
def test_the_pages_show_the_results(page):
    command = [sys.executable, "-m", f"benchmarks.pages.{page}", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
