# SPDX-License-Identifier: Apache-2.0
"""Where the project says which version it is, and what a release's files have to hold.

`python -m tests.release.files` prints the release notes: CHANGELOG's section of this version.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = "prereg_kernels"
UNRELEASED = "Unreleased"
SECTION = re.compile(r"^## (?P<name>\S+)(?: - (?P<date>\d{4}-\d\d-\d\d))?$", re.M)
ABOUT = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}


@dataclass(frozen=True)
class Section:
    """One of CHANGELOG's: a version, or "Unreleased", its date and its text."""

    name: str
    date: str | None
    text: str


def sections(changelog: str) -> list[Section]:
    """Those of CHANGELOG, the newest first."""
    found = list(SECTION.finditer(changelog))
    ends = [*(heading.start() for heading in found[1:]), len(changelog)]
    return [
        Section(heading["name"], heading["date"], changelog[heading.end() : end].strip())
        for heading, end in zip(found, ends, strict=True)
    ]


def version_of(root: Path) -> str:
    """The version in the package's source."""
    text = (root / PACKAGE / "_version.py").read_text()
    [version] = re.findall(r'^__version__ = "(.+)"$', text, re.M)
    return version


def disagreements(root: Path, tags: list[str]) -> list[str]:
    """What says another version than the source does, or another date than CHANGELOG.

    Args:
        root: the top of a checkout.
        tags: those of the commit. Where one is a version, nothing is left unreleased.
    """
    version, changelog = version_of(root), sections((root / "CHANGELOG.md").read_text())
    newest = next(section for section in changelog if section.name != UNRELEASED)
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    said = {
        "CHANGELOG.md": (newest.name, newest.date),
        "CITATION.cff": (citation["version"], str(citation["date-released"])),
    }
    problems = [
        f"{file}: {' of '.join(map(str, each))}, expected {version} of {newest.date}"
        for file, each in said.items()
        if each != (version, newest.date) or newest.date is None
    ]
    releases = [tag for tag in tags if tag.startswith("v")]
    if releases and releases != [f"v{version}"]:
        problems.append(f"tags: {', '.join(releases)}, expected v{version}")
    if releases and any(s.name == UNRELEASED and s.text for s in changelog):
        problems.append("CHANGELOG.md: a tagged commit has unreleased changes")
    return problems


def git(*arguments: str) -> list[str]:
    """The lines that git answers."""
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def in_sdist(path: Path) -> set[str]:
    """The files of an sdist, without its own folder and what setuptools adds."""
    with tarfile.open(path) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    return {n for n in names if not n.startswith(f"{PACKAGE}.egg-info/")} - {
        "PKG-INFO",
        "setup.cfg",
    }


def in_wheel(path: Path) -> set[str]:
    """The files of a wheel."""
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def expected_in_wheel(tracked: list[str], libraries: set[str], version: str) -> set[str]:
    """The package, its C++ sources for `prereg build`, the libraries, and what says what it is."""
    sources = {name for name in tracked if name.startswith(f"{PACKAGE}/")}
    sources |= {f"{PACKAGE}/{name}" for name in tracked if name.startswith("csrc/")}
    about = {f"{PACKAGE}-{version}.dist-info/{name}" for name in ABOUT}
    return sources | {f"{PACKAGE}/{name}" for name in libraries} | about


def notes() -> str:
    """CHANGELOG's section of this version."""
    version = version_of(ROOT)
    [section] = [s for s in sections((ROOT / "CHANGELOG.md").read_text()) if s.name == version]
    return f"# prereg_kernels {version}\n\n{section.text}\n"


if __name__ == "__main__":
    print(notes(), end="")
