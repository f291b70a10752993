# SPDX-License-Identifier: Apache-2.0
"""The curves benchmark's own code, where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import curves
from benchmarks.studies.curves import EAGER, FUSED, TINY, Runs, backwards, distances, halves, smooth
from benchmarks.studies.curves_plot import plot

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("curves") / "curves.json"
    curves.main(["--out", str(path), "--size", "tiny"])
    return path


def test_a_tiny_run(out: Path) -> None:
    results = json.loads(out.read_text())
    assert results["complete"] is True
    assert results["problems"] == []
    for runs in results["curves"].values():
        assert list(runs) == [*EAGER, FUSED]
        for values in runs.values():
            assert len(values) == TINY.steps
            # the same weights, batches and terms: apart by no more than bfloat16's rounding
            assert values == pytest.approx(runs["eager"], abs=0.02)
        assert runs[FUSED] != runs["eager"]
    assert len(results["bars"]) == 4
    assert {name for kinds in results["distances"].values() for name in kinds} == {"max", "rms"}
    lm = results["curves"]["lm_loss"]["eager"]
    assert 2.0 < lm[0] < 6.0  # of some 40 words


def test_time_over_keeps_what_there_is(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "curves.json"
    assert curves.main(["--out", str(path), "--size", "tiny", "--seconds", "0"]) == 1
    results = json.loads(path.read_text())
    assert results["complete"] is False
    assert results["problems"] == ["no time left after 0 steps"]
    assert "no time left" in capsys.readouterr().out


def test_the_runs_are_one_computation() -> None:
    """In float32, the first step's losses and the updated weights of all runs agree."""
    runs = Runs(TINY, CPU)
    runs._autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=False)  # type: ignore[method-assign]
    runs.step(0)
    lm, pre = zip(*runs.step(1).values(), strict=True)
    assert lm == pytest.approx([lm[0]] * 4, rel=1e-4)
    assert pre == pytest.approx([pre[0]] * 4, abs=1e-4)


def test_splits() -> None:
    batch = {"input_ids": torch.arange(6).view(3, 2)}
    assert [part["input_ids"].tolist() for part in halves(batch)] == [[[0, 1]], [[2, 3], [4, 5]]]
    assert backwards(batch)[0]["input_ids"].tolist() == [[4, 5], [2, 3], [0, 1]]


def test_distances() -> None:
    assert smooth([1.0, 2.0, 6.0], 2).tolist() == [1.5, 4.0]
    curves = {
        "eager": [0.0, 0.0, 0.0],
        "eager, halves": [0.0, 1.0, 0.0],
        "eager, reversed": [0.0, 0.0, 2.0],
        FUSED: [3.0, 0.0, 0.0],
    }
    found = distances(curves, 1)
    assert found["max"] == {"noise": 2.0, "fused": 3.0, "ratio": 1.5}
    assert found["rms"]["noise"] == pytest.approx((5 / 3) ** 0.5)
    assert found["rms"]["fused"] == pytest.approx((10 / 3) ** 0.5)
    same = {name: [1.0, 2.0, 3.0] for name in curves}
    assert distances(same, 2)["max"]["ratio"] == 0.0
    assert distances(same | {FUSED: [1.0, 2.0, 4.0]}, 2)["max"]["ratio"] == float("inf")


def test_plot_reads_the_file_alone(out: Path, tmp_path: Path) -> None:
    plot(out, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
