# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/ with ninja. `prereg build` imports this file; setup.py loads it by its path.

The result is plain libraries of torch ops without Python in them, one for each instruction set in
VARIANTS. A variant that cannot be built is left out, and the record beside the libraries says why.
ninja compiles what is out of date. The libraries in use are replaced when it is done, so a build
that is interrupted leaves them. torch's BuildExtension is not used. It compiles one variant after
the other, ignores CXXFLAGS, and keeps no compiler message to say why a variant failed.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECORD = "_rows_build.json"
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
TORCH = """
import json, torch
from torch.utils.cpp_extension import include_paths, library_paths
print(json.dumps({
    "version": torch.__version__,
    "includes": include_paths(),
    "libraries": library_paths(),
    "abi": int(torch.compiled_with_cxx11_abi()),
    "openmp": torch.backends.openmp.is_available(),
}))
"""


class BuildError(Exception):
    """Nothing can be compiled; the message is one line."""


def build(csrc: Path, folder: Path, objects: Path) -> dict[str, Any]:
    """Bring the libraries in `folder` up to date, and their record.

    Where nothing can be compiled, libraries that are there stay.

    Args:
        csrc: the directory of the sources.
        objects: ninja's own directory, to be kept from one build to the next.

    Returns:
        The record. sources: their digest. variants: those that were built. failed: the others, and
        the reason of each. torch and compiler: what built them; absent if nothing could be tried.
    """
    record: dict[str, Any] = {"sources": digest(csrc), "variants": [], "failed": {}}
    objects.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(objects) as lock:
        try:
            compiler, ninja, torch = find_compiler(), find_ninja(), find_torch()
            version = _version(compiler)
            record |= {"torch": torch["version"], "compiler": version}
            (objects / "build.ninja").write_text(_rules(csrc, torch, compiler, version))
            record["failed"] = _run_ninja([ninja, "-C", str(objects)], shlex.join(compiler), lock)
        except BuildError as error:
            record["failed"] = dict.fromkeys(VARIANTS, str(error))
            if read_record(folder).get("variants"):
                return record
        record["variants"] = [name for name in VARIANTS if name not in record["failed"]]
        for variant in record["variants"]:
            _replace(folder / library(variant), objects / library(variant))
        (objects / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        _replace(folder / RECORD, objects / RECORD)
        for variant in record["failed"]:
            (folder / library(variant)).unlink(missing_ok=True)
    return record


def digest(csrc: Path) -> str:
    """The digest of the sources. Libraries of another digest are stale."""
    content = hashlib.sha256()
    for path in sorted([*csrc.glob("*.cpp"), *csrc.glob("*.h")]):
        content.update(path.read_bytes())
    return content.hexdigest()


def library(variant: str) -> str:
    """The name of the variant's file."""
    return f"_rows_{variant}.so"


def read_record(folder: Path) -> dict[str, Any]:
    """The record that `build` has written there; empty if it has not run."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record


def find_compiler() -> list[str]:
    """The C++ compiler's command.

    Raises:
        BuildError: there is none.
    """
    if sys.platform != "linux":
        raise BuildError(f"built on Linux only, this is {sys.platform}")
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler: {command[0]} is not on the PATH")
    return command


def find_torch() -> dict[str, Any]:
    """The version of the torch to build against, and where its headers and libraries are.

    pip's build isolation hides the environment that the package is installed into by PYTHONPATH.
    The libraries will run with the torch of that environment, so it is looked for there too.

    Raises:
        BuildError: there is none.
    """
    open_environment = {key: os.environ[key] for key in os.environ if key != "PYTHONPATH"}
    for environment in (dict(os.environ), open_environment):
        done = subprocess.run(
            [sys.executable, "-c", TORCH], env=environment, capture_output=True, text=True
        )
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found
    reason = (done.stderr.strip().splitlines() or [f"python exited {done.returncode}"])[-1]
    raise BuildError(f"no torch to build against ({reason})")


def find_ninja() -> str:
    """The path of ninja.

    Raises:
        BuildError: there is none.
    """
    try:  # the PATH lacks its directory if an environment is used without being activated
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    path = os.pathsep.join(filter(None, [BIN_DIR, os.environ.get("PATH")]))
    if command := shutil.which("ninja", path=path):
        return command
    raise BuildError("no ninja: pip install ninja")


def _version(compiler: list[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{compiler[0]} does not run: {error}") from error
    return done.stdout.splitlines()[0]


def _rules(csrc: Path, torch: dict[str, Any], compiler: list[str], version: str) -> str:
    """The file that ninja reads."""
    openmp = ["-fopenmp"] if torch["openmp"] else []
    compile_command = [
        *compiler, "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", *openmp,
        f"-D_GLIBCXX_USE_CXX11_ABI={torch['abi']}",
        *(flag for path in torch["includes"] for flag in ("-isystem", path)),
    ]  # fmt: skip
    link_command = [*compiler, "-shared", *shlex.split(os.environ.get("LDFLAGS", ""))]
    link_command += [f"-L{path}" for path in torch["libraries"]]
    link = f"{_shell(link_command)} $in -lc10 -ltorch_cpu -o $out"
    # ninja runs a command again that has changed, so what else can change stands in a comment
    tools = f"# torch {torch['version']}, {version}".replace("$", "$$")
    lines = [
        "rule compile",
        # the headers of torch and of the compiler too, as both may be replaced where they are
        f"  command = {_shell(compile_command)} $flags -MD -MF $out.d -c $in -o $out {tools}",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # First to see that no symbol is missing: it would show on a machine of that variant only.
        # Then without -fopenmp: the OpenMP runtime has to be torch's own, of libtorch_cpu.
        f"  command = {link} {' '.join(openmp)} -Wl,-z,defs && {link} {tools}",
        "  description = $out",
    ]
    sources = sorted(csrc.resolve().glob("*.cpp"))
    for variant, flags in VARIANTS.items():
        mine = [*shlex.split(flags), f"-DPREREG_NAMESPACE=prereg_rows_{variant}"]
        mine += shlex.split(os.environ.get("CXXFLAGS", ""))
        for source in sources:
            lines.append(f"build {variant}/{source.stem}.o: compile {_path(source)}")
            lines.append(f"  flags = {_shell(mine)}")
        objects = " ".join(f"{variant}/{source.stem}.o" for source in sources)
        lines.append(f"build {library(variant)}: link {objects}")
    return "\n".join(lines) + "\n"


def _shell(command: list[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _path(path: Path) -> str:
    escapes = {"$": "$$", " ": "$ ", ":": "$:"}
    return "".join(escapes.get(character, character) for character in str(path))


def _run_ninja(ninja: list[str], compiler: str, lock: int) -> dict[str, str]:
    """Build what can be built; the reasons of the variants that cannot."""
    jobs = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
    command = [*ninja, "-j", str(jobs)]
    environment = os.environ | {"LC_ALL": "C"}
    sys.stdout.flush()
    # setuptools may have detached sys.stdout. A ninja that outlives this process keeps the lock.
    everything = subprocess.run(
        [*command, "-k", "0"], stdout=1, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock]
    )
    failed: dict[str, str] = {}
    for variant in VARIANTS if everything.returncode else ():
        done = subprocess.run(
            [*command, library(variant)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=environment, pass_fds=[lock],
        )  # fmt: skip
        if done.returncode:
            failed[variant] = _reason(done.stdout, compiler)
    return failed


def _reason(output: str, compiler: str) -> str:
    """The first line of the output with an error, which ninja puts after the command."""
    mine = ("ninja: ", "FAILED: ", "[", f"{compiler} ")
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith(mine)]
    errors = (line for line in lines if "error" in line or "undefined" in line)
    return next(errors, lines[-1] if lines else "ninja failed")


@contextmanager
def _locked(objects: Path) -> Iterator[int]:
    """Inside this context, no other build runs in that directory."""
    with (objects / "lock").open("w") as file:
        if sys.platform == "linux":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _replace(target: Path, source: Path) -> None:
    """Whole or not at all, under processes that have the old one loaded; not if it is the same."""
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copy(source, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
