# SPDX-License-Identifier: Apache-2.0
"""The benchmark of token_fraction: a tiny run of what it repeats."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies import token_fraction
from benchmarks.studies.token_fraction import BASELINE, FRACTIONS, run_config, train_and_probe
from tests.demo.tiny import tiny_run


def test_a_run_is_trained_and_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_fraction, "run_config", lambda *_: tiny_run())
    monkeypatch.setattr(token_fraction, "SCENES", 12)
    found = train_and_probe("0.5", 1, None, str(tmp_path))
    assert found.keys() == {"variant", "seed", "layer 1", "layer 2"}
    assert all(0.1 < found[layer] < 1 for layer in ("layer 1", "layer 2"))


def test_variants_differ_in_their_fraction_alone() -> None:
    runs = {fraction: run_config(str(fraction), 2, 7) for fraction in FRACTIONS}
    for fraction, run in runs.items():
        assert run.pre.token_fraction == fraction
        assert run.stages == runs[1.0].stages and run.stages[-1].steps == 7
    baseline = run_config(BASELINE, 2, 7)
    assert not any(stage.pre for stage in baseline.stages) and baseline.seed == run.seed
