# SPDX-License-Identifier: Apache-2.0
"""Build script. The metadata is in pyproject.toml; this adds the compiled row primitives (csrc/).

They are optional: what cannot be built is left out with a warning, and the package says why.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# By its path: the package needs torch to be imported, which may not be here
ROWS = runpy.run_path("prereg_kernels/ops/backends/cpp_build.py")
CSRC = Path("csrc")
SOURCES = sorted(map(str, CSRC.glob("*.cpp")))
HEADERS = sorted(map(str, CSRC.glob("*.h")))


class BuildRows(build_ext):
    """Builds every variant, and never fails. Installed packages get the sources too."""

    def run(self) -> None:
        package = Path("." if self.inplace else self.build_lib, "prereg_kernels")
        objects = Path(self.get_finalized_command("build").build_base, "rows")
        record = ROWS["build"](CSRC, package, objects)
        self.outputs = [
            package / name for name in (ROWS["RECORD"], *map(ROWS["library"], record["variants"]))
        ]
        if not self.inplace:  # for `prereg build`
            shutil.rmtree(package / "csrc", ignore_errors=True)
            shutil.copytree(CSRC, package / "csrc")
            self.outputs += (package / "csrc").iterdir()
        failed = record["failed"]
        for reason in dict.fromkeys(failed.values()):
            names = ", ".join(name for name in failed if failed[name] == reason)
            print(f"warning: compiled row primitives ({names}) left out: {reason}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.outputs]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildWheel(bdist_wheel):
    """The libraries work with any Python, on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(f"prereg_kernels._rows_{variant}", SOURCES, depends=HEADERS)
        for variant in ROWS["VARIANTS"]
    ],
    cmdclass={"build_ext": BuildRows, "bdist_wheel": BuildWheel},
)
