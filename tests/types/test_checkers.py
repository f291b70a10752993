# SPDX-License-Identifier: Apache-2.0
"""What type checkers tell a user, who has the package installed in place."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import prereg_kernels

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SCRIPTS = ("right.py", "wrong.py")
Found = list[tuple[str, int]]  # the file and line of each error


def marked() -> Found:
    """The mistakes."""
    lines = [(name, (HERE / name).read_text().splitlines()) for name in SCRIPTS]
    return [(name, n) for name, text in lines for n, x in enumerate(text, 1) if "# wrong" in x]


def output_of(*command: str | Path, place: Path) -> str:
    """Of a checker, which finds the package by the environment alone."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the package installed in place, and all that is installed here.

    The build is that of `pip install -e .`, but for the compiled rows.
    """
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "prereg_kernels").symlink_to(Path(prereg_kernels.__file__).parent)
    build = "from setuptools import build_meta; build_meta.build_editable('.')"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, capture_output=True, check=True)
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    [packages] = place.glob("lib/*/site-packages")
    (packages / "here.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    [wheel] = checkout.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    return place / "bin" / "python"


def mypy(python: Path, place: Path, cache: Path) -> Found:
    """transformers is not followed, to save half a minute."""
    (place / "mypy.ini").write_text(
        "[mypy]\nstrict = True\n[mypy-transformers.*]\nfollow_imports = skip\n"
    )
    arguments = ("--python-executable", python, "--cache-dir", cache, "--no-pretty")
    output = output_of(sys.executable, "-m", "mypy", *arguments, *SCRIPTS, place=place)
    errors = re.findall(r"^([\w.]+):(\d+): error", output, re.M)
    assert len(errors) == output.count(" error: "), output
    return [(name, int(line)) for name, line in errors]


def basedpyright(python: Path, place: Path, cache: Path) -> Found:
    """As pyright, whose rules are the standard ones here. It follows transformers, too."""
    (place / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    arguments = ("--pythonpath", python, "--outputjson")
    output = output_of(sys.executable, "-m", "basedpyright", *arguments, *SCRIPTS, place=place)
    return [
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in json.loads(output)["generalDiagnostics"]
        if each["severity"] == "error"
    ]


@pytest.mark.parametrize("checker", (mypy, basedpyright))
def test_a_checker_finds_the_mistakes_and_nothing_else(
    checker: Callable[[Path, Path, Path], Found],
    python: Path,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    for name in SCRIPTS:
        shutil.copy(HERE / name, tmp_path)
    expected = marked()
    assert len(expected) == 12
    assert checker(python, tmp_path, pytestconfig.cache.mkdir("mypy")) == expected
