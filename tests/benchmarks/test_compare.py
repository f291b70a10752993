# SPDX-License-Identifier: Apache-2.0
"""The comparison of two revisions: its batches and bytes, and what it makes of them."""

from __future__ import annotations

import json
import math
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, revisions
from benchmarks.compare import (
    BASE,
    CALLS,
    MEMORY,
    ROOT,
    STEPS,
    THIS,
    Cell,
    Worker,
    interval,
    measure,
    peaks,
    ratio_of,
    summarize,
    table,
    verdict,
)
from benchmarks.revisions import bring_rows, checkout_of
from prereg_kernels.ops.backends.cpp_build import RECORD, digest, library

ONE, TWO = (Cell("fused", "torch", rows, 64, "float32") for rows in (1, 3))
SLOW = """
import time

def fused_pre_loss(hidden, anchor, weights, biases, *, backend):
    begin = time.process_time()
    while time.process_time() < begin + 0.02:
        pass
    return sum(x.sum() for x in (hidden, *weights, *biases))

def pre_tap(hidden, *arguments, **options):
    kept = [bytearray(64 * 2**20) for _ in range(hidden.shape[0] // 1000)]
    for x in kept:
        x[::4096] = b"x" * (len(x) // 4096)
    return hidden.view_as(hidden), fused_pre_loss(hidden, *arguments, **options)
"""


def turn(this: float, base: float) -> dict[str, list[int]]:
    """Batches of three calls, of which one is held up."""
    return {name: [int(x), int(x), 50 * int(x)] for name, x in ((THIS, this), (BASE, base))}


def test_a_ratio_is_of_neighbours() -> None:
    """A machine that is three times slower for some turns changes nothing, nor one bad turn."""
    turns = [turn(1100 * slow, 1000 * slow) for slow in (1, 3, 3, 1)] + [turn(9000, 1000)]
    assert ratio_of(turns) == pytest.approx(1.1)


def test_the_interval_is_that_of_the_pairs() -> None:
    logs = [0.1, 0.2, 0.3]
    for level, t in ((0.95, 4.302653), (0.99, 9.924843)):  # of two degrees of freedom
        found = interval([math.exp(x) for x in logs], level)
        half = t * 0.1 / math.sqrt(3)
        assert math.log(found["ratio"]) == pytest.approx(0.2)
        assert math.log(found["low"]) == pytest.approx(0.2 - half)
        assert math.log(found["high"]) == pytest.approx(0.2 + half)


@pytest.mark.parametrize(
    ("low", "ratio", "high", "expected"),
    (
        (1.01, 1.05, 1.09, "SLOWER"),
        (0.99, 1.05, 1.11, "same"),
        (1.001, 1.005, 1.009, "same"),
        (0.91, 0.95, 0.99, "faster"),
        (0.991, 0.995, 0.999, "same"),
    ),
)
def test_a_verdict_takes_the_interval_and_a_hundredth(
    low: float, ratio: float, high: float, expected: str
) -> None:
    assert verdict({"low": low, "ratio": ratio, "high": high}, "SLOWER", "faster") == expected


def test_summary() -> None:
    cells = {
        ONE: [[turn(2000, 1000)] * 2, [turn(2100, 1000)], [turn(1900, 1000)]],
        TWO: [[turn(1000, 1000)], [turn(1010, 1000)], [turn(990, 1000)]],
    }
    records = summarize(cells)
    assert [r["cell"] for r in records] == [
        "fused, torch, 1 x 64 float32", "fused, torch, 3 x 64 float32",
    ]  # fmt: skip
    assert records[0][THIS] == pytest.approx({"min_us": 1.9, "median_us": 2.05})
    assert records[0]["pairs"] == pytest.approx([2.0, 2.1, 1.9])
    assert [r["verdict"] for r in records] == ["SLOWER", "same"]
    # both cells together keep the level: 2.5% each
    half = math.log(records[0]["high"] / records[0]["ratio"])
    assert half == pytest.approx(6.205347 * 0.0500625 / math.sqrt(3), rel=1e-3)


def test_equal_revisions_are_seldom_called_different_and_five_percent_is_seen() -> None:
    """Pairs of processes differ by 1% by themselves, the machine by tens from turn to turn."""
    draw = random.Random(0)

    def run(factor: float) -> list[str]:
        cells = {}
        for cell in (*CALLS, *STEPS):
            cells[cell] = []
            for _ in range(10):
                own, turns = math.exp(draw.gauss(0, 0.01)), []
                for _ in range(5):
                    machine = 1e6 * math.exp(draw.gauss(0, 0.2))
                    noise = math.exp(draw.gauss(0, 0.02))
                    turns.append(
                        {THIS: [int(machine * own * factor * noise)], BASE: [int(machine)]}
                    )
                cells[cell].append(turns)
        return [record["verdict"] for record in summarize(cells)]

    wrong = sum(set(run(1.0)) != {"same"} for _ in range(40))
    assert wrong <= 4  # 2 are expected at most
    seen = [v for _ in range(10) for v in run(1.05)]
    assert seen.count("SLOWER") > 0.98 * len(seen)


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A checkout whose calls take 20 ms, and whose tap takes memory."""
    package = tmp_path / "checkout" / "prereg_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SLOW)
    return package.parent


def test_processes_take_turns_with_the_package_of_their_checkout(slow: Path) -> None:
    found = measure({THIS: ROOT, BASE: slow}, [ONE, TWO], pairs=1, turns=2)
    assert list(found) == [ONE, TWO]
    for [pair] in found.values():
        assert len(pair) == 2
        for batches in pair:
            assert min(batches[BASE]) > 2e7 > min(batches[THIS]) > 2e4
            assert len(batches[BASE]) == len(batches[THIS]) == 1


def test_bytes_are_those_of_a_step(slow: Path) -> None:
    """The slow package's tap takes 64 MiB for each thousand rows."""
    cell = Cell("tap", "torch", 2000, 16, "float32")
    found = peaks({THIS: slow, BASE: ROOT}, cell, processes=1)
    assert 120 * 2**20 <= found["bytes"][THIS][0] < 140 * 2**20
    assert found["bytes"][BASE][0] < 16 * 2**20
    assert found["verdict"] == "MORE"


def test_another_package_is_refused(slow: Path) -> None:
    (slow / "prereg_kernels" / "__init__.py").rename(slow / "prereg_kernels.py")
    (slow / "prereg_kernels").rmdir()
    worker = Worker(slow)
    try:
        with pytest.raises(RuntimeError, match="expected its package, found that of"):
            worker.check()
    finally:
        worker.end()
    with pytest.raises(RuntimeError, match="no answer"):
        worker.batch(ONE, 1)


@pytest.mark.parametrize(
    ("time", "memory", "code"),
    ((1.05, 1.0, 1), (1.0, 1.0, 0), (0.95, 1.0, 0), (1.0, 1.05, 1), (1.0, 0.9, 0)),
)
def test_what_is_slower_or_larger_is_said(
    time: float, memory: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:  # fmt: skip
    def measured(checkouts: Any, cells: Any, *others: Any) -> dict[Any, Any]:
        assert checkouts == {THIS: ROOT, BASE: tmp_path}
        return {
            cell: [[turn(1e6 * x * (time if cell.name == "tap" else 1), 1e6)] * 2 for x in noise]
            for cell in cells
        }

    def bytes_of(checkouts: Any, cell: Cell, processes: int) -> Any:
        ratio = memory if cell.name == "tap" else 1.0
        found = {"ratio": ratio, "low": ratio, "high": ratio, "bytes": {THIS: [2], BASE: [1]}}
        return {"cell": str(cell), "verdict": verdict(found, "MORE", "less"), **found}

    noise = [1.001, 0.999] * 5
    monkeypatch.setattr(compare, "measure", measured)
    monkeypatch.setattr(compare, "peaks", bytes_of)
    out = tmp_path / "calls.json"
    assert compare.main([str(tmp_path), "--out", str(out)]) == code
    stored = json.loads(out.read_text())
    assert {"device", "torch", "commit", "dirty", "date"} <= stored["machine"].keys()
    assert (stored["pairs"], stored["commits"][BASE]) == (10, None)
    assert [c["cell"] for c in stored["cells"]] == [str(c) for c in (*CALLS, *STEPS)]
    assert [c["cell"] for c in stored["memory"]] == [str(c) for c in MEMORY]
    for record in (*stored["cells"], *stored["memory"]):
        expected = memory if record in stored["memory"] else time
        assert record["ratio"] == pytest.approx(
            expected if record["cell"].startswith("tap") else 1.0, rel=1e-3
        )
    printed = capsys.readouterr().out
    assert printed == table(stored) + "\n"
    assert ("SLOWER" in printed, "MORE" in printed) == (time > 1, memory > 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--pairs", "1"], "--pairs 1: an interval takes 2 at least"),
        (["--only", "nothing"], "--only nothing: in no cell's name"),
    ),
)
def test_options_are_checked(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_a_revision_lies_beside_with_rows_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied where the sources are equal, compiled where they are not; once."""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True)

    root = tmp_path / "root"
    (root / "csrc").mkdir(parents=True)
    (root / "prereg_kernels").mkdir()
    (root / "prereg_kernels" / "__init__.py").write_text("first = True\n")
    (root / "csrc" / "a.cpp").write_text("1")
    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-qm", "one")
    (root / "prereg_kernels" / "__init__.py").write_text("first = False\n")
    git("commit", "-qam", "two")
    old = checkout_of("HEAD~1", root, tmp_path / "beside")
    assert (old / "prereg_kernels" / "__init__.py").read_text() == "first = True\n"
    assert checkout_of("HEAD~1", root, tmp_path / "beside") == old
    with pytest.raises(ValueError, match="'nothing': expected a revision"):
        checkout_of("nothing", root, tmp_path / "beside")

    compiled: list[Path] = []

    def compile_rows(command: list[str], cwd: Path, check: bool) -> None:
        assert command[1:] == ["setup.py", "-q", "build_ext", "--inplace"] and check
        compiled.append(cwd)
        record = {"sources": digest(cwd / "csrc"), "variants": ["base"]}
        (cwd / "prereg_kernels" / RECORD).write_text(json.dumps(record))
        (cwd / "prereg_kernels" / library("base")).write_text(f"of {cwd.name}")

    monkeypatch.setattr(revisions.subprocess, "run", compile_rows)
    bring_rows(root, old)
    bring_rows(old, root)
    bring_rows(old, root)
    assert compiled == [root]
    assert (old / "prereg_kernels" / library("base")).read_text() == "of root"
    (old / "csrc" / "a.cpp").write_text("2")
    bring_rows(old, root)
    bring_rows(old, root)
    assert compiled == [root, old]


def test_the_commit_is_not_that_of_what_lies_around(slow: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    around = slow.parent
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(around), *command], check=True)
    assert compare.commit_of(slow) is None
    commit = compare.commit_of(around)
    assert commit is not None and len(commit) >= 7
