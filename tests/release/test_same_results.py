# SPDX-License-Identifier: Apache-2.0
"""Which numbers of a demo are compared with those of another commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.release import same_results
from tests.release.figures import stamps_of


def test_times_and_memory_are_left_out() -> None:
    results = [
        {
            "seed": 0, "variant": "pre", "accuracy": {"read": 0.5}, "train_step_seconds": 2.5,
            "cost": {"peak_bytes": 7}, "is_done": True, "norm": [1.5, 2.5],
        }
    ]  # fmt: skip
    assert dict(same_results.numbers(results)) == {
        "/0/seed": 0, "/0/accuracy/read": 0.5, "/0/norm/0": 1.5, "/0/norm/1": 2.5,
    }  # fmt: skip


def test_one_bit_is_a_difference() -> None:
    before = {"/a": 0.1 + 0.2, "/b": 1.0, "/gone": 2.0}
    changed = same_results.differences(before, {"/a": 0.3, "/b": 1.0, "/new": 3.0})
    assert sorted(changed) == ["/a", "/gone", "/new"]
    assert same_results.differences(before, before) == []


def test_every_study_is_asked_about() -> None:
    names = {name for studies in same_results.studied().values() for name in studies}
    others = {"demo.json", "few_shot", "head_dtype.json", "photographs", "token_fraction.json"}
    own = {
        "adapters.json",
        "claims.json",
        "deepstack.json",
        "depth.json",
        "merging.json",
        "tuning.json",
    }
    assert names == own | others
    assert all(stamp.commit in same_results.studied() for stamp in stamps_of("few_shot"))


def test_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a commit that gives the same, one that does not, and one whose demo does not run."""
    here = {"/a": 1.0, "/b": 2.0}
    given = {"same": here, "other": here | {"/b": 2.5}}

    def results_of(checkout: Path) -> dict[str, float]:
        if checkout.name == "old":
            raise RuntimeError("prereg: --steps: expected something else")
        return given.get(checkout.name, here)

    monkeypatch.setattr(same_results, "results_of", results_of)
    monkeypatch.setattr(same_results, "checkout_of", lambda commit, *rest: Path(commit))
    monkeypatch.setattr(same_results, "bring_rows", lambda *checkouts: None)
    same_results.main(["same", "other", "old", "--out", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["commits"]
    assert [row["other"] for row in rows] == [0, 1, "does not run so"]
    assert rows[1]["examples"] == ["/b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        "|  | same | 2 | 0 |",
        "|  | other | 2 | 1 |",
        "|  | old | 0 | does not run so |",
    ]
