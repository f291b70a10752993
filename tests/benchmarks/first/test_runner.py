# SPDX-License-Identifier: Apache-2.0
"""The runner of parts: budgets, failures, hangs, and files that are whole after every part."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.first import runner
from benchmarks.first.runner import Part, Run

WRITES = "import json, sys; json.dump({'seen': sys.argv[2]}, open(sys.argv[1], 'w'))"
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
open(sys.argv[1], "w").write('{"seen": "before it hung"}')
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise SystemExit(3)
"""
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"


def part(name: str, seconds: float, code: str, **options: object) -> Part:
    """A part that runs a few lines of Python, which get the file and the seconds."""

    def command(file: Path, limit: float) -> Sequence[str]:
        return ["-c", code, str(file), f"{limit:.2f}"]

    return Part(name, seconds, command, **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.5)
    monkeypatch.setattr(runner, "LEAST", 0.2)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_fails_or_hangs_takes_no_other_along(tmp_path: Path) -> None:
    run = Run("first", tmp_path / "out", budget=6.5)
    parts = (
        part("one", 1, WRITES),
        part("crashes", 1, "raise SystemExit('no device')"),
        part("hangs", 1, HANGS),
        part("last", 1, WRITES, kept="last.json"),
    )
    began = time.monotonic()
    assert not run.parts(parts)
    assert time.monotonic() - began < 6.5
    stored = json.loads((tmp_path / "out" / "first.json").read_text())
    assert stored["complete"] is True
    statuses = {record["name"]: record["status"] for record in stored["parts"]}
    assert statuses["one"] == statuses["last"] == "ok"
    assert statuses["crashes"] == "failed: exit code 1"
    assert statuses["hangs"].startswith("stopped after")
    # what a part has written by then is kept
    assert set(stored["results"]) == {"one", "hangs"}
    assert stored["results"]["hangs"] == {"seen": "before it hung"}
    assert json.loads((tmp_path / "out" / "last.json").read_text())["seen"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "first.json",
        "first.log",
        "last.json",
    }
    log = (tmp_path / "out" / "first.log").read_text()
    assert "no device" in log and "interrupted" in log
    [child] = [int(line.split()[1]) for line in log.splitlines() if line.startswith("child")]
    assert not is_alive(child)


@pytest.mark.dry  # by the clock
def test_time_that_is_left_goes_to_the_next(tmp_path: Path) -> None:
    """And what hangs takes none from the rest, which ends with the budget."""
    run = Run("first", tmp_path, budget=6.5)
    run.parts((part("short", 4, WRITES), part("deaf", 2, DEAF), part("last", 4, WRITES)))
    limits = [float(record["limit_s"]) for record in run.results["parts"]]
    short, deaf, last = run.results["parts"]
    assert limits[0] == pytest.approx(2.4, abs=0.2)
    # its share is 1.2; the first took little of 2.4
    assert 1.3 < limits[1] <= 3.6 - short["seconds"] + 0.2
    assert deaf["status"].startswith("stopped after") and last["status"] == "ok"
    assert deaf["seconds"] >= limits[1] + runner.GRACE - 0.2  # then it was killed
    assert limits[2] <= 2.4 - runner.GRACE + 0.2
    assert run.results["seconds"] < 6.5


def test_without_time_a_part_does_not_start(tmp_path: Path) -> None:
    run = Run("first", tmp_path, budget=1.1)
    assert not run.parts(
        (part("long", 1, "import time; time.sleep(9)"), part("none", 0.001, WRITES))
    )
    assert run.results["parts"][1]["status"] == "skipped: no time left"


def test_files_are_whole_after_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next part sees those of the one before; a junit file gets its name when it is done."""
    looks = """
import json, os, sys
out = os.environ["OUT"]
run = json.load(open(out + "/first.json"))
names = sorted(os.listdir(out))
json.dump({"parts": [p["name"] for p in run["parts"]], "files": names}, open(sys.argv[1], "w"))
"""
    run = Run("first", tmp_path, budget=11.0)
    parts = (
        part("tests", 3, WRITES, kept="tests.xml", renamed=True),
        part("looks", 3, looks, environment={"OUT": str(tmp_path)}),
    )
    assert run.parts(parts)
    assert run.results["results"]["looks"] == {
        "parts": ["tests"], "files": ["first.json", "first.log", "tests.xml"],
    }  # fmt: skip
    assert run.results["parts"][0]["file"] == "tests.xml"


def test_a_file_that_is_too_large_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LARGEST_FILE", 1000)
    monkeypatch.setattr(runner, "TAIL", 100)
    large = "import sys; open(sys.argv[1], 'w').write('x' * 1001); print('y' * 5000)"
    run = Run("first", tmp_path, budget=7.0)
    run.parts(
        (part("large", 1, large, kept="large.json"), part("none", 1, "pass", kept="none.json"))
    )
    assert [record["file"] for record in run.results["parts"]] == [
        "left out: 1001 bytes", "was not written",
    ]  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["first.json", "first.log"]
    assert (tmp_path / "first.log").stat().st_size < 400
