"""Builds the C++ CPU core as an optional extension: without a compiler the installation succeeds and says so.

`LOBCQ_REPOSITORY`, the repository's address, is set for a release: the README's links, shown by PyPI, begin with it.
"""

import os
import re
import runpy
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

BUILD = runpy.run_path(str(Path(__file__).parent / "lobcq_fx" / "kernels" / "cpu" / "build.py"))


class BuildCore(build_ext):
    """The core's own compiler commands; the result is a plain shared library, which ctypes opens."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the core calls nothing of Python's."""
        return str(Path(*fullname.split(".")).with_suffix(BUILD["SUFFIX"]))

    def build_extension(self, ext: Extension) -> None:
        """Compile, or warn once and go on with the torch implementation."""
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            BUILD["compile_core"](output)
        except BUILD["BuildError"] as error:
            warnings.warn(f"lobcq_fx: no CPU core, its ops will run through plain torch: {error}", stacklevel=1)


class Wheel(bdist_wheel):
    """One wheel for every Python 3 on a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The platform's tag alone is what the core depends on."""
        return "py3", "none", super().get_tag()[2]


def project_urls(repository: str) -> dict[str, str]:
    """What PyPI lists beside the description."""
    if not repository:
        return {}
    files = f"{repository}/blob/main"
    return {
        "Repository": repository,
        "Documentation": f"{repository}/tree/main/docs",
        "Changelog": f"{files}/CHANGELOG.md",
        "Security": f"{files}/SECURITY.md",
    }


def description(repository: str) -> str:
    """The README, its links to files of the repository made absolute, pictures as raw files."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    if not repository:
        return text
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\g<1>{repository}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{repository}/blob/main/", text)


REPOSITORY = os.environ.get("LOBCQ_REPOSITORY", "").rstrip("/")

setup(
    long_description=description(REPOSITORY),
    long_description_content_type="text/markdown",
    project_urls=project_urls(REPOSITORY),
    ext_modules=[Extension("lobcq_fx.kernels.cpu._core", sources=[], optional=True)],
    cmdclass={"build_ext": BuildCore, "bdist_wheel": Wheel},
)
