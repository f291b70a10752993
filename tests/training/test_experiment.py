"""What results in a directory belong to: one experiment, begun anew only where it is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prereg_kernels.training.experiment import ExperimentConfig, open_experiment
from tests.training.tiny import tiny_run


def test_fresh_removes_what_other_settings_left(tmp_path: Path) -> None:
    config = ExperimentConfig(run=tiny_run(), seeds=1)
    open_experiment(config, tmp_path, False)
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "towers").mkdir()
    (tmp_path / "cost.json").write_text("{}")
    open_experiment(replace(config, seeds=3), tmp_path, False)  # more seeds: the same experiment
    other = replace(config, probe_test_scenes=config.probe_test_scenes + 1)
    with pytest.raises(ValueError, match="holds results of other settings"):
        open_experiment(other, tmp_path, False)
    assert (tmp_path / "seed-0").exists() and (tmp_path / "cost.json").exists()
    open_experiment(other, tmp_path, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiment.json", "towers"]
