"""Build script. The metadata is in pyproject.toml; this adds the compiled row primitives.

The extension is optional: where csrc/ has no sources, or nothing can compile them, the package
installs without it and runs on plain PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))


def extensions() -> dict[str, Any]:
    """Keyword arguments of `setup` for the extension; empty where there is nothing to build."""
    if not SOURCES:
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"prereg-kernels: no compiled row primitives ({error})")
        return {}

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                print(f"prereg-kernels: no compiled row primitives ({str(error).splitlines()[0]})")
                self.extensions = []

    extension = CppExtension("prereg_kernels._C", SOURCES, extra_compile_args=["-O3", "-fopenmp"])
    extension.optional = True
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extensions())
