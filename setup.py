"""Builds the C++ CPU core as an optional extension: without a compiler the installation succeeds and says so."""

import runpy
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = runpy.run_path(str(Path(__file__).parent / "lobcq_fx" / "kernels" / "cpu" / "build.py"))


class BuildCore(build_ext):
    """One compiler command of the core's own; the result is a plain shared library under an extension's name."""

    def build_extension(self, ext: Extension) -> None:
        """Compile, or warn once and go on with the torch implementation."""
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            BUILD["compile_core"](output)
        except BUILD["BuildError"] as error:
            warnings.warn(f"lobcq_fx: no CPU core, its ops will run through plain torch: {error}", stacklevel=1)


setup(
    ext_modules=[Extension("lobcq_fx.kernels.cpu._core", sources=[], optional=True)],
    cmdclass={"build_ext": BuildCore},
)
