"""Build script. The metadata is in pyproject.toml; this adds the compiled row primitives (csrc/).

They are plain libraries of torch ops, without Python in them, one for each instruction set in
VARIANTS. They are optional: what cannot be built is left out with a warning, and the package says
why when asked. What was built, and against what, is written beside the libraries, in BUILD.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
BUILD = "_rows_build.json"  # read by prereg_kernels/ops/backends/cpp.py
# The flags of torch's own kernels for the same instruction sets
VARIANTS = {"base": "-O2 -DCPU_CAPABILITY=DEFAULT -DCPU_CAPABILITY_DEFAULT"}
if platform.machine() in ("x86_64", "AMD64"):
    avx512 = (
        "-O2 -mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mf16c "
        "-DCPU_CAPABILITY=AVX512 -DCPU_CAPABILITY_AVX512"
    )
    VARIANTS |= {
        "avx2": "-O2 -mavx2 -mfma -mf16c -DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2",
        "avx512": avx512,
        "avx512_bf16": f"{avx512} -mavx512bf16",  # ours: converts to bfloat16 in one instruction
    }


class BuildError(Exception):
    """Something cannot be compiled; the message is one line."""


class Compiler:
    """The C++ compiler, set up for torch's headers and libraries."""

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise BuildError(f"built on Linux only, this is {sys.platform}")
        command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        if shutil.which(command[0]) is None:
            raise BuildError(f"no C++ compiler: {command[0]} is not on the PATH")
        try:
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            message = f"no torch to build against ({error}): use --no-build-isolation"
            raise BuildError(message) from error
        self.torch = torch.__version__
        self.name = run([*command, "--version"]).splitlines()[0]
        self.openmp = ["-fopenmp"] if torch.backends.openmp.is_available() else []
        self.compile_command = [
            *command, "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas",
            *self.openmp,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(flag for path in include_paths() for flag in ("-isystem", path)),
        ]  # fmt: skip
        self.link_command = [
            *command, "-shared", *shlex.split(os.environ.get("LDFLAGS", "")),
            *(f"-L{path}" for path in library_paths()),
        ]  # fmt: skip

    def compile(self, variant: str, source: str, target: Path) -> None:
        flags = [*VARIANTS[variant].split(), f"-DPREREG_NAMESPACE=prereg_rows_{variant}"]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        run([*self.compile_command, *flags, "-c", source, "-o", str(target)])

    def link(self, objects: list[Path], target: Path) -> None:
        libraries = ["-lc10", "-ltorch_cpu"]
        command = [*self.link_command, *map(str, objects), *libraries, "-o", str(target)]
        # A missing symbol has to show here, not first on a machine of that variant
        run([*command, *self.openmp, "-Wl,-z,defs"])
        # No -fopenmp: the OpenMP runtime has to be torch's own, which comes with libtorch_cpu
        run(command)


def run(command: list[str]) -> str:
    """The command's output.

    Raises:
        BuildError: it failed; the message is its first line with an error.
    """
    try:
        environment = os.environ | {"LC_ALL": "C"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{command[0]} exited {done.returncode}"]
        told = (line for line in lines if "error" in line or "undefined" in line)
        raise BuildError(next(told, lines[-1]))
    return done.stdout


class BuildRows(build_ext):
    """Compiles every source of every variant, side by side, and never fails."""

    def run(self) -> None:
        package = Path("." if self.inplace else self.build_lib, "prereg_kernels")
        package.mkdir(parents=True, exist_ok=True)
        self.outputs = [package / BUILD]
        for stale in (package / BUILD, *package.glob("_rows_*.so")):
            stale.unlink(missing_ok=True)
        build: dict[str, object] = {"sources": digest(), "variants": [], "failed": {}}
        try:
            compiler = Compiler()
            build |= {"torch": compiler.torch, "compiler": compiler.name}
            failed = self.build_variants(compiler, package)
            build["variants"] = [name for name in VARIANTS if name not in failed]
        except BuildError as error:
            failed = dict.fromkeys(VARIANTS, str(error))
        build["failed"] = failed
        (package / BUILD).write_text(json.dumps(build, indent=2) + "\n")
        for reason in dict.fromkeys(failed.values()):
            names = ", ".join(name for name in failed if failed[name] == reason)
            print(f"warning: compiled row primitives ({names}) left out: {reason}", file=sys.stderr)

    def build_variants(self, compiler: Compiler, package: Path) -> dict[str, str]:
        """Build what can be built; the reasons of the variants that cannot."""
        temp = Path(self.build_temp)
        objects = {
            (variant, source): temp / variant / f"{Path(source).stem}.o"
            for source in reversed(SOURCES)
            for variant in VARIANTS
        }
        for target in objects.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        failed = {}
        jobs = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(jobs) as pool:
            waiting = {
                key: pool.submit(compiler.compile, *key, target) for key, target in objects.items()
            }
            for variant in VARIANTS:
                try:
                    mine = [key for key in objects if key[0] == variant]
                    for key in mine:
                        waiting[key].result()
                    library = package / f"_rows_{variant}.so"
                    compiler.link([objects[key] for key in mine], library)
                    self.outputs.append(library)
                except BuildError as error:
                    failed[variant] = str(error)
        return failed

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.outputs]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildWheel(bdist_wheel):
    """The libraries work with any Python, on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def digest() -> str:
    """Of the sources: a checkout whose sources have changed has stale libraries."""
    content = hashlib.sha256()
    for path in sorted([*SOURCES, *HEADERS]):
        content.update(Path(path).read_bytes())
    return content.hexdigest()


setup(
    ext_modules=[Extension("prereg_kernels._rows", SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": BuildRows, "bdist_wheel": BuildWheel},
)
