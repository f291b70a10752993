# SPDX-License-Identifier: Apache-2.0
"""The build of the C++ kernels: what is compiled again, what fails, and what stays as it was.

The sources are tiny, and two libraries without content stand for torch's.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from prereg_kernels.ops.backends import cpp_build
from prereg_kernels.ops.backends.cpp_build import (
    RECORD,
    BuildError,
    build,
    digest,
    find_torch,
    library,
)

VARIANTS = {"one": "-O0", "two": "-O0 -DTWO"}
SOURCES = {
    "first.cpp": "int first() { return 1; }\n",
    "second.cpp": '#include "shared.h"\nint second() { return SHARED; }\n',
    "shared.h": "#define SHARED 2\n",
}
# Says what it compiles and links, and does it
COMPILER = """#!/bin/sh
log=$(dirname "$0")/log
for argument; do
    case $argument in
        *.cpp) echo "begin ${argument##*/}" >> "$log";;
        *.so) echo link >> "$log";;
    esac
done
echo "flags $*" >> "$log"
PAUSE
c++ "$@"
code=$?
echo end >> "$log"
exit $code
"""


class Project:
    """Sources, a compiler that keeps a log, and where the libraries go."""

    def __init__(self, root: Path) -> None:
        self.csrc, self.folder, self.objects = (root / name for name in ("csrc", "lib", "objects"))
        self.compiler, self.log = root / "compiler", root / "log"
        self.csrc.mkdir(parents=True)
        for name, text in SOURCES.items():
            (self.csrc / name).write_text(text)
        self.set_pause("")
        stubs = root / "stubs"
        stubs.mkdir()
        for name in ("libc10.so", "libtorch_cpu.so"):
            command = ["c++", "-shared", "-x", "c++", "/dev/null", "-o", str(stubs / name)]
            subprocess.run(command, check=True)
        self.torch: dict[str, Any] = {
            "version": "2.13.0",
            "includes": [],
            "libraries": [str(stubs)],
        }
        self.torch |= {"abi": 1, "openmp": False}

    def set_pause(self, command: str) -> None:
        """What the compiler does first."""
        self.compiler.write_text(COMPILER.replace("PAUSE", command))
        self.compiler.chmod(0o755)

    def paths(self) -> tuple[Path, Path, Path]:
        return self.csrc, self.folder, self.objects

    def build(self) -> dict[str, Any]:
        self.log.unlink(missing_ok=True)
        return build(*self.paths())

    def work(self) -> list[str]:
        """What the last build has compiled and linked."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return sorted(
            line.removeprefix("begin ") for line in lines if not re.match("flags|end", line)
        )

    def append(self, name: str, text: str) -> None:
        with (self.csrc / name).open("a") as file:
            file.write(text)

    def libraries(self) -> dict[str, tuple[bytes, int]]:
        """{name: content and inode} of what is in use."""
        files = sorted(self.folder.iterdir())
        return {path.name: (path.read_bytes(), path.stat().st_ino) for path in files}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    project = Project(tmp_path / "it's $5 a day")
    monkeypatch.setattr(cpp_build, "VARIANTS", VARIANTS)
    monkeypatch.setattr(cpp_build, "find_torch", lambda: project.torch)
    monkeypatch.setenv("CXX", shlex.quote(str(project.compiler)))
    for name in ("CXXFLAGS", "LDFLAGS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    yield project


EVERYTHING = ["first.cpp"] * 2 + ["link"] * 4 + ["second.cpp"] * 2


def test_from_nothing(project: Project) -> None:
    record = project.build()
    assert project.work() == EVERYTHING
    assert record["variants"] == ["one", "two"] and record["failed"] == {}
    assert record["torch"] == "2.13.0" and record["sources"] == digest(project.csrc)
    assert json.loads((project.folder / RECORD).read_text()) == record
    assert set(project.libraries()) == {RECORD, library("one"), library("two")}
    defined = subprocess.run(
        ["nm", "-C", project.folder / library("two")], capture_output=True, text=True, check=True
    ).stdout
    assert "first()" in defined and "second()" in defined


def test_unchanged_does_nothing(project: Project) -> None:
    project.build()
    before = project.libraries()
    assert project.build()["variants"] == ["one", "two"]
    assert project.work() == []
    assert project.libraries() == before


def test_one_source_recompiles_its_objects_alone(project: Project) -> None:
    project.build()
    project.append("first.cpp", "int third() { return 3; }\n")
    project.build()
    assert project.work() == ["first.cpp"] * 2 + ["link"] * 4


def test_a_header_recompiles_what_includes_it(project: Project) -> None:
    project.build()
    before = project.libraries()
    (project.csrc / "shared.h").write_text("#define SHARED 22\n")
    project.build()
    assert project.work() == ["link"] * 4 + ["second.cpp"] * 2
    assert project.libraries()[library("one")] != before[library("one")]


@pytest.mark.parametrize("change", ("CXXFLAGS", "torch", "compiler"))
def test_what_else_recompiles_everything(
    project: Project, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    project.build()
    if change == "CXXFLAGS":
        monkeypatch.setenv("CXXFLAGS", "-DMINE='a b'")
    elif change == "torch":
        project.torch["version"] = "2.14.0"
    else:
        monkeypatch.setattr(cpp_build, "_version", lambda compiler: "another c++")
    project.build()
    assert project.work() == EVERYTHING
    assert ("-DMINE=a b" in project.log.read_text()) == (change == "CXXFLAGS")


def test_linker_flags_link_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.build()
    monkeypatch.setenv("LDFLAGS", "-Wl,--hash-style=sysv")
    project.build()
    assert project.work() == ["link"] * 4
    assert project.log.read_text().count("-Wl,--hash-style=sysv") == 4


@pytest.mark.parametrize("jobs", (1, 2))
def test_max_jobs(project: Project, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    project.set_pause("sleep 0.2")
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    project.build()
    lines = project.log.read_text().splitlines()
    changes = [line.startswith("flags") - (line == "end") for line in lines]
    assert max(accumulate(changes)) == jobs


@pytest.mark.parametrize(
    ("text", "reason"),
    (
        ("#error no such instruction\n", "error: #error no such instruction"),
        (
            "int missing(); int third() { return missing(); }\n",
            "undefined reference to `missing()'",
        ),
    ),
)
def test_a_variant_that_fails_is_left_out(
    project: Project, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-DNO=error,undefined")  # as sanitizers' are: no reason
    project.build()
    before = project.libraries()
    project.append("first.cpp", f"int more() {{ return 4; }}\n#ifdef TWO\n{text}#endif\n")
    record = project.build()
    assert record["variants"] == ["one"]
    assert list(record["failed"]) == ["two"]
    assert reason in record["failed"]["two"] and "\n" not in record["failed"]["two"]
    after = project.libraries()
    assert set(after) == {RECORD, library("one")}
    assert after[library("one")] != before[library("one")]
    (project.csrc / "first.cpp").write_text(SOURCES["first.cpp"])
    assert project.build()["variants"] == ["one", "two"]


def test_nothing_to_compile_with(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    reason = "no C++ compiler: /nowhere/c++ is not on the PATH"
    record = project.build()
    assert record["failed"] == {"one": reason, "two": reason}
    assert "torch" not in record
    assert json.loads((project.folder / RECORD).read_text()) == record


def test_libraries_stay_where_nothing_can_be_compiled(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.build()
    before = project.libraries()
    monkeypatch.setattr(cpp_build.shutil, "which", lambda command, path=None: None)
    assert project.build()["variants"] == []
    assert project.libraries() == before


@pytest.mark.parametrize(
    ("stop", "pause"),
    ((signal.SIGTERM, "sleep 60"), (signal.SIGKILL, "sleep 2")),  # ninja ends compilers, or cannot
    ids=("stopped", "killed"),
)
def test_an_interrupted_build_leaves_the_libraries(
    project: Project, monkeypatch: pytest.MonkeyPatch, stop: signal.Signals, pause: str
) -> None:
    monkeypatch.setenv("MAX_JOBS", "1")
    project.build()
    before = project.libraries()
    project.append("first.cpp", "int third() { return 3; }\n")
    half = project.objects / "one" / "first.o"
    project.set_pause(f'case "$*" in *first.cpp*) echo half > one/first.o; {pause};; esac')
    code = (
        f"import runpy; build = runpy.run_path({cpp_build.__file__!r})['build']; "
        f"build.__globals__.update(VARIANTS={VARIANTS}, find_torch=lambda: {project.torch}); "
        f"from pathlib import Path; build(*map(Path, {[*map(str, project.paths())]}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        while half.read_bytes() != b"half\n":
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, stop)
        process.wait()
    if stop == signal.SIGKILL:  # no other build before that compiler ends
        with (project.objects / "lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert project.libraries() == before
    project.set_pause("")
    assert project.build()["variants"] == ["one", "two"]
    assert project.work() == ["first.cpp"] * 2 + ["link"] * 4


def test_the_torch_of_the_environment_is_found_in_an_isolated_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip isolates a build by a directory on PYTHONPATH that hides the environment's packages."""
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = find_torch()
    assert found["version"] == torch.__version__
    assert (Path(found["includes"][0]) / "torch" / "library.h").is_file()
    assert (Path(found["libraries"][0]) / "libtorch_cpu.so").is_file()


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_build, "TORCH", "import a_package_that_nobody_has")
    with pytest.raises(BuildError, match=r"no torch to build against \(ModuleNotFoundError: .*\)$"):
        find_torch()


def test_setup_loads_it_without_the_package() -> None:
    names = runpy.run_path(cpp_build.__file__)
    assert names["VARIANTS"] == cpp_build.VARIANTS and names["RECORD"] == RECORD
