# SPDX-License-Identifier: Apache-2.0
"""A revision beside this checkout: its files, and its own compiled rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from prereg_kernels.ops.backends.cpp_build import RECORD, digest, library, read_record


def checkout_of(revision: str, root: Path, folder: Path) -> Path:
    """A directory with the revision's files: `folder` / its commit, made where there is none.

    Raises:
        ValueError: git knows no such revision.
    """
    named = f"{revision}^{{commit}}"
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "--short", named],
        capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode:
        raise ValueError(f"{revision!r}: expected a revision of {root}")
    place = folder.resolve() / found.stdout.strip()
    if not place.is_dir():
        partly = place.with_name(f"{place.name}.partly")
        shutil.rmtree(partly, ignore_errors=True)
        partly.mkdir(parents=True)
        archive = ["git", "-C", str(root), "archive", place.name]
        files = subprocess.run(archive, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(partly)], input=files, check=True)
        partly.rename(place)
    return place


def bring_rows(checkout: Path, other: Path) -> None:
    """The compiled rows of the checkout: the other one's, if their sources are equal, or new ones.

    Raises:
        CalledProcessError: they cannot be compiled.
    """
    package, theirs = checkout / "prereg_kernels", other / "prereg_kernels"
    wanted = digest(checkout / "csrc")
    if read_record(package).get("sources") == wanted:
        return
    record = read_record(theirs)
    if record.get("sources") == wanted:
        for name in (RECORD, *map(library, record["variants"])):
            shutil.copy(theirs / name, package / name)
        return
    print(f"compiles the rows of {checkout.name}, which takes minutes", file=sys.stderr)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=checkout, check=True)
