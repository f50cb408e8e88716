"""What is uploaded: a whole source archive, one wheel for every Python 3, a README whose links work elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lobcq_fx.kernels.cpu.build import SUFFIX, BuildError, find_compiler

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://example.org/somebody/lobcq_fx"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive of the checkout, and the wheel that is built of it.

    Its core is compiled with every warning an error, and without optimization, which takes most of a compiler's time.
    """
    pytest.importorskip("setuptools", minversion="77", reason="builds without a network: setuptools has to be here")
    folder = tmp_path_factory.mktemp("archives")
    try:
        compiler = Path(find_compiler())
    except BuildError as error:
        pytest.skip(str(error))
    strict = tmp_path_factory.mktemp("compiler") / compiler.name
    strict.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" -O0 -Werror\n')
    strict.chmod(0o755)
    environment = os.environ | {"LOBCQ_REPOSITORY": REPOSITORY, "CXX": str(strict)}

    def build(what: str, source: Path) -> None:
        code = f"from setuptools import build_meta; build_meta.build_{what}({str(folder)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, check=True, capture_output=True)

    build("sdist", ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    build("wheel", source)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: nothing says which files there are")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return set(listed.splitlines())


def test_what_is_cited_is_this_version() -> None:
    assert f"\nversion: {version('lobcq-fx')}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_source_archive_has_every_file_of_the_repository(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert tracked() - packed <= {".gitignore", ".ci/run"}


def test_the_wheel_has_the_core_and_is_for_every_python(archives: tuple[Path, Path]) -> None:
    wheel = archives[1]
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert f"lobcq_fx/kernels/cpu/_core{SUFFIX}" in names
    assert {name.split("/")[0] for name in names} == {"lobcq_fx", wheel.name.partition("-py3")[0] + ".dist-info"}
    of_the_package = {name for name in tracked() if name.startswith("lobcq_fx/")}
    assert of_the_package <= names


def test_what_pypi_shows_links_to_the_repository(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as file:
        (name,) = (name for name in file.namelist() if name.endswith("METADATA"))
        metadata = HeaderParser().parsestr(file.read(name).decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert any(REPOSITORY in url for url in metadata.get_all("Project-URL", []))
    links = re.findall(r"\]\(([^)]*)\)", str(metadata.get_payload()))
    ours = [link for link in links if link.startswith(REPOSITORY)]
    assert all(link.startswith(("https://", "http://", "#")) for link in links)
    for link in ours:
        kind, _, path = link.removeprefix(f"{REPOSITORY}/").partition("/main/")
        assert (ROOT / path.partition("#")[0]).exists(), link
        assert (kind == "raw") == path.endswith(".png")
    assert ours


def test_packages_whose_next_major_release_may_break_us_have_an_upper_bound() -> None:
    needed = [Requirement(text) for text in requires("lobcq-fx") or []]
    bounds = {one.name: one.specifier for one in needed if one.marker is None}
    for name in ("torch", "transformers", "safetensors", "numpy"):
        assert any(one.operator == "<" for one in bounds[name]), name


def test_plots_and_templates_are_not_needed_by_the_command_line() -> None:
    """Both are in the extra "report": what else runs does so without them."""
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['jinja2'] = None\n"
        "import lobcq_fx.cli.summary, lobcq_fx.cli.export, lobcq_fx.report\n"
        "lobcq_fx.report.write_report('folder', 'page.html')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.splitlines()[-1].endswith(
        'ReportError: the report needs jinja2: pip install "lobcq-fx[report]"'
    )
