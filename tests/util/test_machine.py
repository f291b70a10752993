# SPDX-License-Identifier: Apache-2.0
"""The stamp of a result: the commit of this package's own repository, or none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from prereg_kernels._util import machine


def git(*command: str, cwd: Path) -> str:
    who = ("-c", "user.name=n", "-c", "user.email=e@x")
    run = subprocess.run(["git", *who, *command], cwd=cwd, capture_output=True, check=True)
    return run.stdout.decode().strip()


def test_an_installed_package_does_not_take_the_commit_of_what_is_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    unknown = {"commit": "unknown", "dirty": None}
    assert machine.describe_source(None) == unknown  # no repository at all
    file = tmp_path / "prereg_kernels" / "_util" / "machine.py"
    file.parent.mkdir(parents=True)
    file.write_text("one")
    git("init", "-q", cwd=tmp_path)
    git("commit", "-q", "--allow-empty", "-m", "somebody else's", cwd=tmp_path)
    assert machine.describe_source(None) == unknown
    git("add", ".", cwd=tmp_path)
    git("commit", "-q", "-m", "ours", cwd=tmp_path)
    head = git("rev-parse", "--short", "HEAD", cwd=tmp_path)
    assert machine.describe_source(None) == {"commit": head, "dirty": False}
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "study.json").write_text("{}")  # which a study writes as it goes
    assert machine.describe_source(None) == {"commit": head, "dirty": False}
    (results.parent / "study.py").write_text("pass")
    assert machine.describe_source(None) == {"commit": head, "dirty": True}
    (results.parent / "study.py").unlink()
    file.write_text("two")
    assert machine.describe_source(None) == {"commit": head, "dirty": True}
    assert machine.describe_source("abc-dirty") == {"commit": "abc", "dirty": True}
