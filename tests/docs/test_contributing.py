# SPDX-License-Identifier: Apache-2.0
"""What CONTRIBUTING.md says of versions, times and skips."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tests.docs.pages import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_python_that_the_pins_take() -> None:
    """The lowest that every package of constraints.txt installs on. The package's own is 3.10."""
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    here = {x.metadata["Name"] for x in metadata.distributions()}
    needs = [str(metadata.metadata(x)["Requires-Python"]) for x in pins if x in here]
    assert len(needs) > 80
    lowest = max(int(minor) for need in needs for minor in re.findall(r">=\s*3\.(\d+)", need))
    assert f"python3, 3.{lowest} or newer. The package itself takes 3.10," in PAGE
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()


def test_an_older_python_is_told_before_anything_is_installed(tmp_path: Path) -> None:
    backends = "prereg_kernels/ops/backends/cpp_build.py"
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt", backends):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    old = tmp_path / "python3.10"
    as_if = "import sys; sys.version_info = (3, 10, 4, 'final', 0); exec(sys.argv[2])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{as_if}" "$@"\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", ".venv/.ready", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"MAKEFLAGS": "", "MAKELEVEL": "0"},
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / ".venv").exists()
    assert f"PYTHON={old}: expected Python 3.11 or newer, as constraints.txt does" in done.stderr
    assert "got 3.10" in done.stderr


def test_times_are_those_of_the_help() -> None:
    """The minutes of each target in `make help` are in the table of this page, too."""
    table = PAGE.partition("| target | it takes |")[2].partition("\n\n")[0]
    rows = {
        target: row
        for names, row in re.findall(r"^\| (`make .+?`) \| (.*) \|$", table, re.M)
        for target in re.findall(r"`make ([\w-]+)", names)
    }
    helps = dict(re.findall(r"^([\w-]+):.*?## (.*)$", MAKEFILE, re.M))
    timed = 0
    for target, row in rows.items():
        minutes = re.search(r"(\d+) minutes", helps[target])
        if minutes is not None:
            timed += 1
            assert re.search(rf"\b{minutes[1]} minutes", row), f"{target}: {row}"
    assert timed > 15


def test_no_test_skips_because_a_tool_is_missing() -> None:
    """No condition of a skip looks for a program or a package, but on a GPU machine."""
    looking = {"which", "find_spec", "is_dir"}
    seen = 0
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.is_relative_to(ROOT / "tests" / "gpu"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert "importorskip" not in called, path
            if isinstance(node, ast.Call) and called.endswith("mark.skipif"):
                tested: ast.AST = node.args[0]
            elif isinstance(node, ast.If) and "pytest.skip(" in ast.unparse(node.body[0]):
                tested = node.test
            else:
                continue
            seen += 1
            names = {x.attr for x in ast.walk(tested) if isinstance(x, ast.Attribute)}
            assert not names & looking, f"{path}: {ast.unparse(tested)}"
    assert seen > 10
