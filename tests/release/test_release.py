# SPDX-License-Identifier: Apache-2.0
"""A release: versions that agree, and files that are whole and work where nothing else is.

Those marked `release` need what `make release-check` has built, and run by it alone.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from tests.release import figures, files
from tests.release.files import ROOT, Section, disagreements, expected_in_wheel, sections

BUILD = ROOT / "build" / "release"
ROWS = runpy.run_path(str(ROOT / files.PACKAGE / "ops" / "backends" / "cpp_build.py"))
LIBRARIES = {ROWS["RECORD"], *map(ROWS["library"], ROWS["VARIANTS"])}
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_project_says_one_version() -> None:
    assert disagreements(ROOT, []) == []


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """One of version 1.2.0 that agrees with itself."""
    (tmp_path / files.PACKAGE).mkdir()
    (tmp_path / files.PACKAGE / "_version.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("version: 1.2.0\ndate-released: 2030-01-02\n")
    (tmp_path / "CHANGELOG.md").write_text(
        "# C\n\n## Unreleased\n\n## 1.2.0 - 2030-01-02\n\nNew.\n"
    )
    return tmp_path


def test_agreement(project: Path) -> None:
    assert disagreements(project, []) == disagreements(project, ["v1.2.0", "nightly"]) == []


@pytest.mark.parametrize(
    ("file", "text", "instead", "tags", "expected"),
    (
        ("CHANGELOG.md", "## 1.2.0", "## 1.1.0", [], "CHANGELOG.md: 1.1.0"),
        ("CHANGELOG.md", " - 2030-01-02", "", [], "CHANGELOG.md: 1.2.0 of None"),
        ("CITATION.cff", "1.2.0", "1.1.0", [], "CITATION.cff: 1.1.0"),
        ("CITATION.cff", "01-02", "01-03", [], "CITATION.cff: 1.2.0 of 2030-01-03"),
        ("CITATION.cff", "", "", ["v1.1.0"], "tags: v1.1.0"),
        ("CHANGELOG.md", "\n## 1", "\n- Left.\n\n## 1", ["v1.2.0"], "unreleased changes"),
    ),
)
def test_disagreement(
    project: Path, file: str, text: str, instead: str, tags: list[str], expected: str
) -> None:
    path = project / file
    path.write_text(path.read_text().replace(text, instead, 1))
    assert expected in " | ".join(disagreements(project, tags))


def test_changes_wait_where_no_version_is_tagged(project: Path) -> None:
    path = project / "CHANGELOG.md"
    path.write_text(path.read_text().replace("Unreleased\n", "Unreleased\n\n- Left.\n"))
    assert disagreements(project, ["nightly"]) == []


def test_sections() -> None:
    text = (
        "# C\n\nIntro.\n\n## Unreleased\n\n### Added\n\n- A.\n\n## 0.1.0 - 2026-11-25\n\nFirst.\n"
    )
    assert sections(text) == [
        Section("Unreleased", None, "### Added\n\n- A."),
        Section("0.1.0", "2026-11-25", "First."),
    ]


def test_notes_are_this_version_s_alone() -> None:
    older = [s.name for s in sections((ROOT / "CHANGELOG.md").read_text())][-1]
    assert files.version_of(ROOT) in files.notes() and f"## {older}" not in files.notes()


def test_no_test_is_expected_in_a_wheel() -> None:
    tracked = ["prereg_kernels/py.typed", "csrc/rows.h", "tests/helpers.py", "benchmarks/host.py"]
    found = {n for n in expected_in_wheel(tracked, {"_rows.so"}, "1.0") if "dist-info" not in n}
    package = {"py.typed", "csrc/rows.h", "_rows.so"}
    assert found == {f"prereg_kernels/{name}" for name in package}


# What follows needs the files of `make release-check`


def built(pattern: str) -> Path:
    [path] = (BUILD / "dist").glob(pattern)
    return path


@pytest.mark.release
def test_the_tag_is_of_this_version() -> None:
    assert disagreements(ROOT, files.git("tag", "--points-at", "HEAD")) == []


@pytest.mark.release
def test_an_sdist_has_all_that_is_tracked() -> None:
    tracked = set(files.git("ls-files")) - {".gitignore"}
    assert files.in_sdist(built("*.tar.gz")) == tracked


@pytest.mark.release
def test_a_wheel_has_the_package_alone() -> None:
    expected = expected_in_wheel(files.git("ls-files"), LIBRARIES, files.version_of(ROOT))
    assert files.in_wheel(built("*.whl")) == expected


@pytest.mark.release
def test_what_a_wheel_says_of_itself() -> None:
    with zipfile.ZipFile(built("*.whl")) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        about = message_from_string(archive.read(name).decode())
        points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert about["Version"] == files.version_of(ROOT)
    assert about["License-Expression"] == "Apache-2.0" and about["License-File"] == "LICENSE"
    [extras] = re.findall(r"^\[project\.optional-dependencies\]\n(.*?)^\[", PROJECT, re.M | re.S)
    assert set(about.get_all("Provides-Extra", [])) == set(re.findall(r"^(\w+) = \[", extras, re.M))
    assert points.split() == ["[console_scripts]", "prereg", "=", "prereg_kernels.cli:main"]
    assert about["Requires-Python"] == ">=3.10"


def test_every_result_has_its_line_and_says_what_it_measures() -> None:
    """Of figures.py, whose table says what is older than the code."""
    there = {path.name for path in figures.RESULTS.iterdir()}
    assert sorted((*figures.MEASURES, *figures.HISTORY)) == sorted(there)
    assert all(figures.stamps_of(name) for name in figures.MEASURES)
    assert all((ROOT / path).exists() for paths in figures.MEASURES.values() for path in paths)


def test_only_one_page_has_figures_of_earlier_commits() -> None:
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")):
        cited = set(re.findall(r"benchmarks/results/([\w.]+)", page.read_text()))
        if page.name != "history.md":
            assert not cited & set(figures.HISTORY), page


def test_what_has_changed_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"a": [{"commit": "1f5a560", "device": "x"}], "b": {"commit": "0", "dirty": True}}
    assert set(figures.stamps(there)) == {("1f5a560", False, "x"), ("0", True, "")}
    monkeypatch.setattr(files, "ROOT", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    run([*git, "init", "-q"], tmp_path)
    for name in ("x", "x", "y"):
        with (tmp_path / name).open("a") as file:
            file.write(name)
        run([*git, "add", name], tmp_path)
        run([*git, "commit", "-q", "-m", name], tmp_path)
    assert figures.changed_since("HEAD", ("x", "y")) == []
    assert figures.changed_since("HEAD~2", ("x",)) == ["x"]
    assert figures.changed_since("HEAD~2", ("x", "y")) == ["x", "y"]
    (tmp_path / "x").write_text("x")  # as it was at first, and not committed
    assert figures.changed_since("HEAD~2", ("x",)) == []
    with pytest.raises(subprocess.CalledProcessError):
        figures.changed_since("0" * 40, ("x",))


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "changed_since", lambda commit, paths: paths)
    lines = figures.table().splitlines()[2:]
    assert {line.split(" | ")[0].lstrip("| ") for line in lines} == set(figures.MEASURES)
    [cpu] = [line for line in lines if line.startswith("| cpu_avx512.json ")]
    assert cpu.endswith(" | 2 |") and len(cpu.split(" | ")[1]) == 7


def run(command: list[str | Path], cwd: Path) -> str:
    # Whose checkout would pass for the installed package
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# The wheel with nothing optional; the sdist, which pip builds by itself, with what trains
@pytest.mark.release
@pytest.mark.parametrize(("pattern", "extra"), (("*.whl", ""), ("*.tar.gz", "[train]")))
def test_each_file_in_an_environment_of_its_own(pattern: str, extra: str, tmp_path: Path) -> None:
    environment, away = tmp_path / "environment", tmp_path / "away"
    away.mkdir()
    run([sys.executable, "-m", "venv", environment], away)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    run([*pip, "torch"], away)  # first, as docs/install.md says: the rows are built against it
    run([*pip, f"{built(pattern)}{extra}"], away)
    run([python, "-m", "pip", "check"], away)
    report = json.loads(run([environment / "bin" / "prereg", "doctor", "--json"], away))
    assert report["versions"]["prereg_kernels"] == files.version_of(ROOT)
    assert (report["versions"]["extras"]["train"] == "installed") == bool(extra)
    assert all(report["backends"][name].startswith("runs") for name in ("cpp", "torch"))
    for path in (Path(__file__).with_name("installed.py"), ROOT / "tests" / "helpers.py"):
        shutil.copy(path, away)
    said = json.loads(run([python, "installed.py"], away))
    assert said["version"] == files.version_of(ROOT)
    assert {"cpp", "torch"} <= set(said["backends"])
    shutil.rmtree(environment)  # some GB
