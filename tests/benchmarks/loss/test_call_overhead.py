"""The benchmark of call overhead: its batches, and what it makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loss import call_overhead
from benchmarks.loss.call_overhead import (
    AGAINST,
    ROOT,
    THIS,
    Worker,
    interval,
    measure,
    ratio_of,
    summarize,
)

SLOW = """
import time

def fused_pre_loss(hidden, anchor, weights, biases, *, backend):
    time.sleep(0.02)
    return sum(x.sum() for x in (hidden, *weights, *biases))
"""


def turn(this: float, against: float) -> dict[str, list[int]]:
    """Batches of three calls, of which one is held up."""
    return {name: [int(x), int(x), 50 * int(x)] for name, x in ((THIS, this), (AGAINST, against))}


def test_a_ratio_is_of_neighbours() -> None:
    """A machine that is three times slower for some turns changes nothing, nor one bad turn."""
    turns = [turn(1100 * slow, 1000 * slow) for slow in (1, 3, 3, 1)] + [turn(9000, 1000)]
    assert ratio_of(turns) == pytest.approx(1.1)


def test_the_interval_is_that_of_the_pairs() -> None:
    logs = [0.1, 0.2, 0.3]
    found = interval([math.exp(x) for x in logs])
    half = 4.302653 * 0.1 / math.sqrt(3)  # t of two degrees of freedom
    assert math.log(found["ratio"]) == pytest.approx(0.2)
    assert math.log(found["low"]) == pytest.approx(0.2 - half)
    assert math.log(found["high"]) == pytest.approx(0.2 + half)


def test_summary() -> None:
    cells = {
        ("torch", 1): [[turn(2000, 1000)] * 2, [turn(8000, 1000)]],
        ("torch", 2): [[turn(1000, 1000)], [turn(1000, 1000)]],
    }
    records, overall = summarize(cells)
    assert [(r["backend"], r["rows"]) for r in records] == list(cells)
    assert records[0][THIS] == {"min_us": 2.0, "median_us": 8.0}
    assert records[0]["pairs"] == pytest.approx([2.0, 8.0])
    assert records[0]["ratio"] == pytest.approx(4.0)
    assert records[0]["ratio_of_minima"] == pytest.approx(2.0)
    assert overall.keys() == {"torch"}
    assert overall["torch"]["ratio"] == pytest.approx(2.0)  # of sqrt 2 and sqrt 8
    assert overall["torch"]["ratio_of_minima"] == pytest.approx(math.sqrt(2))


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A checkout whose calls take 20 ms."""
    package = tmp_path / "checkout" / "prereg_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SLOW)
    return package.parent


def test_processes_take_turns_with_the_package_of_their_checkout(slow: Path) -> None:
    cells = [("torch", 1), ("torch", 3)]
    found = measure({THIS: ROOT, AGAINST: slow}, cells, pairs=1, turns=2)
    assert list(found) == cells
    for [pair] in found.values():
        assert len(pair) == 2
        for batches in pair:
            assert min(batches[AGAINST]) > 2e7 > min(batches[THIS]) > 2e4
            assert len(batches[AGAINST]) == len(batches[THIS]) == 5


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
        worker.batch(("torch", 1), 1)


@pytest.mark.parametrize(("factor", "code"), ((1.2, 1), (1.0, 0), (0.9, 0)))
def test_a_slower_backend_is_said(
    factor: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def measured(checkouts: Any, cells: Any, pairs: int, turns: int) -> dict[Any, Any]:
        assert checkouts == {THIS: ROOT, AGAINST: tmp_path}
        noise = [1.02, 0.99, 1.01]
        return {
            cell: [[turn(1e6 * x * (factor if cell[0] == "cpp" else 1), 1e6)] * 2 for x in noise]
            for cell in cells
        }

    monkeypatch.setattr(call_overhead, "measure", measured)
    out = tmp_path / "calls.json"
    assert call_overhead.main(["--against", str(tmp_path), "--out", str(out)]) == code
    stored = json.loads(out.read_text())
    assert {"device", "torch", "commit", "dirty", "date"} <= stored["machine"].keys()
    assert (stored["pairs"], stored["commits"][AGAINST]) == (3, None)
    rows = [1, 2, 4, 8, 16, 32, 64]
    assert [(c["backend"], c["rows"]) for c in stored["cells"]] == [
        *(("torch", n) for n in rows), *(("cpp", n) for n in rows),
    ]  # fmt: skip
    mean = (1.02 * 0.99 * 1.01) ** (1 / 3)
    assert stored["overall"]["torch"]["ratio"] == pytest.approx(mean, rel=1e-4)
    assert stored["overall"]["cpp"]["ratio"] == pytest.approx(mean * factor, rel=1e-4)
    assert "| cpp, all" in capsys.readouterr().out


def test_one_pair_has_no_interval(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        call_overhead.main(["--against", str(tmp_path), "--pairs", "1"])
    assert "--pairs 1: an interval takes 2 at least" in capsys.readouterr().err
