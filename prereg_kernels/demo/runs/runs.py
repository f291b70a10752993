# SPDX-License-Identifier: Apache-2.0
"""A run's directory: what it holds, and how those of version 0.1.0 are told, which have no mark."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from prereg_kernels._util.directories import LOCK, MARK, held, is_marked
from prereg_kernels._util.settings_file import from_dict, load_config, read_yaml
from prereg_kernels.demo.checkpoints.checkpoint import (
    CHECKPOINTS,
    checkpoints_in,
    clear_checkpoints,
    is_checkpoint,
)
from prereg_kernels.demo.config import RunConfig, save_config
from prereg_kernels.demo.metrics import METRICS_FILE, TENSORBOARD
from prereg_kernels.demo.training_checkup import CHECKUPS_FILE

CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
ERROR_FILE = "error.log"

Report = Callable[[str, Path, int], None]
"""Told of each phase of a unit: its name, the run's directory, its number of training steps."""

_NAMES = (CONFIG_FILE, METRICS_FILE, CHECKUPS_FILE, f"{TENSORBOARD}/", f"{CHECKPOINTS}/")


@contextmanager
def held_run(directory: Path, config: RunConfig) -> Iterator[None]:
    """Hold a run's directory; see `held`. These very settings may lie there already."""

    def is_ours(directory: Path) -> bool:
        there = [name for name in _NAMES if os.path.lexists(directory / name)]
        only_settings = there == [CONFIG_FILE] and _settings(directory) == config
        return only_settings or _is_old_run(directory)

    with held(directory, "run", _NAMES, is_ours, is_checkpoint):
        yield


def write_settings(config: RunConfig, directory: Path) -> None:
    """Write a run's settings, unless they are there, perhaps with a user's comments."""
    if _settings(directory) != config:
        save_config(config, directory / CONFIG_FILE)


def _settings(directory: Path) -> RunConfig | None:
    try:
        return load_config(directory / CONFIG_FILE, RunConfig)
    except (OSError, ValueError):
        return None


def is_run(directory: Path) -> bool:
    """Whether a run has written there."""
    return is_marked(directory, "run") or _is_old_run(directory)


def _is_old_run(directory: Path) -> bool:
    """Whether each file is as a run of version 0.1.0 writes it; none is without its settings."""
    try:
        if not _is_written(directory / CONFIG_FILE):
            return False
        for name, keys in ((METRICS_FILE, {"step", "stage", "lm_loss", "lr", "grad_norm"}),
                           (CHECKUPS_FILE, {"step", "accuracy", "probe"})):  # fmt: skip
            if (directory / name).exists() and not _has_lines(directory / name, keys):
                return False
    except (OSError, ValueError):
        return False
    return all(map(is_checkpoint, checkpoints_in(directory)))


def _is_written(config: Path) -> bool:
    """Whether `save_config` wrote this, and not somebody whose comments are in it."""
    values = read_yaml(config)
    from_dict(RunConfig, values)
    return config.read_text(encoding="utf-8") == yaml.safe_dump(values, sort_keys=False)


def _has_lines(path: Path, keys: set[str]) -> bool:
    """Whether each line is JSON with these keys; a crash may have cut off the last one."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        values = json.loads(line)
        if not isinstance(values, dict) or not keys <= values.keys():
            return False
    return True


def delete_run(directory: Path) -> None:
    """Delete what a run and its measuring left in `directory`, and it too where nothing is left.

    What somebody else put there stays; a directory that is no run's is not touched.

    Raises:
        CheckpointError: as in `clear_checkpoints`.
    """
    if not is_run(directory):
        return
    clear_checkpoints(directory)
    for path in directory.glob("transfer-*/"):
        delete_run(path)
    with contextlib.suppress(OSError, ValueError):
        if _is_written(directory / CONFIG_FILE):
            (directory / CONFIG_FILE).unlink()
    for name in (METRICS_FILE, CHECKUPS_FILE, RESULT_FILE, ERROR_FILE, MARK, LOCK):
        (directory / name).unlink(missing_ok=True)
    for path in directory.glob(f"{TENSORBOARD}/events.out.tfevents.*"):
        path.unlink()
    for path in (directory / CHECKPOINTS, directory / TENSORBOARD, directory):
        remove_if_empty(path)


def remove_if_empty(directory: Path) -> None:
    """Remove a directory that holds nothing."""
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
