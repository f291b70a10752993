"""Build script. The metadata is in pyproject.toml; this adds the compiled row primitives.

The extension is optional: where csrc/ has no sources, or nothing can compile them, the package
installs without it and runs on plain PyTorch.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))


def extensions() -> dict[str, object]:
    """Keyword arguments of `setup` for the extension; empty where it cannot be built."""
    if not SOURCES:
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("prereg-kernels: torch is not installed at build time: no compiled row primitives")
        return {}
    extension = CppExtension("prereg_kernels._C", SOURCES, extra_compile_args=["-O3", "-fopenmp"])
    extension.optional = True
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extensions())
