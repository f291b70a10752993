# SPDX-License-Identifier: Apache-2.0
"""What results in a directory belong to: one experiment, begun anew only where it is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prereg_kernels.demo.experiment.experiment import ExperimentConfig, open_experiment
from tests.demo.tiny import tiny_run


def begin(config: ExperimentConfig, out: Path, fresh: bool) -> None:
    with open_experiment(config, out, fresh):
        pass


def test_fresh_removes_what_other_settings_left(tmp_path: Path) -> None:
    config = ExperimentConfig(run=tiny_run(), seeds=1)
    begin(config, tmp_path, False)
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "towers").mkdir()
    (tmp_path / "cost.json").write_text("{}")
    begin(replace(config, seeds=3), tmp_path, False)  # more seeds: the same experiment
    other = replace(config, probe_test_scenes=config.probe_test_scenes + 1)
    with pytest.raises(ValueError, match="holds results of other settings"):
        begin(other, tmp_path, False)
    assert (tmp_path / "seed-0").exists() and (tmp_path / "cost.json").exists()
    begin(other, tmp_path, True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".prereg", ".prereg.lock", "experiment.json", "towers"}


def test_an_experiment_of_version_0_1_0_is_known_by_its_settings(tmp_path: Path) -> None:
    """Whose transfer test was another; it left no mark."""
    old = {"seeds": 1, "transfer": {"family": "tilt", "frozen_steps": 300, "steps": 120}}
    (tmp_path / "experiment.json").write_text(json.dumps(old))
    (tmp_path / "seed-0").mkdir()
    config = ExperimentConfig(run=tiny_run(), seeds=1)
    with pytest.raises(ValueError, match="holds results of other settings"):
        begin(config, tmp_path, False)
    begin(config, tmp_path, True)
    assert not (tmp_path / "seed-0").exists()
