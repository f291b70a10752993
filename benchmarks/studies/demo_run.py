# SPDX-License-Identifier: Apache-2.0
"""The demo's run with other settings of PRe, for studies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any


def demo_run(seed: int, pre: Mapping[str, Any] | None, steps: int | None = None) -> Any:
    """Its settings, without a checkpoint on the way.

    Args:
        pre: settings of PRe that differ from the demo's; None: the baseline, without PRe.
        steps: of the last stage; None: its own.
    """
    from prereg_kernels._util.settings_file import load_config
    from prereg_kernels.demo.experiment.experiment import ExperimentConfig, Unit, run_config

    preset = files("prereg_kernels.demo") / "presets" / "scenes.yaml"
    config = load_config(Path(str(preset)), ExperimentConfig)
    run = run_config(config, Unit(seed, "baseline" if pre is None else "pre"))
    run = replace(run, pre=replace(run.pre, **(pre or {})), checkpoint_every=10**6)
    if steps is not None:
        run = replace(run, stages=(*run.stages[:-1], replace(run.stages[-1], steps=steps)))
    return run
