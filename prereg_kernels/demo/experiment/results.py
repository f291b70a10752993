# SPDX-License-Identifier: Apache-2.0
"""Results of an experiment or a sweep in its directory, and the settings that they belong to."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import printable, read_json, write_whole
from prereg_kernels.demo.data.scenes import PROPERTIES
from prereg_kernels.demo.runs.runs import RESULT_FILE, delete_run, is_run, remove_if_empty


def unit_names(out: Path) -> list[str]:
    """The names in `out` under which units have, or would have, their directories."""
    if not out.is_dir():
        return []
    return [f"{path.name}/" for path in out.iterdir() if re.fullmatch(r"seed-\d+", path.name)]


def read_result(directory: Path) -> dict[str, Any] | None:
    """A finished unit's result, None if it is not finished.

    Raises:
        ValueError: it cannot be read.
    """
    path = directory / RESULT_FILE
    if not path.exists():
        return None
    result = read_json(path)
    if not _is_result(result):
        raise ValueError(f"{printable(path)}: expected a unit's result; without it, it runs again")
    return result


def _is_result(result: Any) -> bool:
    """Whether it has what reports read, by seed and by layer."""
    if not isinstance(result, dict) or type(result.get("seed")) is not int:
        return False
    names = ("accuracy", "probe", "structure", "states")
    groups = [x for x in map(result.get, names) if isinstance(x, dict)]
    if len(groups) < len(names) or not set(PROPERTIES) <= groups[1].keys():
        return False
    levels = [result.get("mean_accuracy"), result.get("lm_loss"), *groups[0].values()]
    for group in groups[1:]:
        for values in group.values():
            levels += values if isinstance(values, list) and values else [None]
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in levels)


def claim(
    out: Path, kind: str, settings: dict[str, Any], *, free: Sequence[str], fresh: bool
) -> None:
    """Write down what the results in `out` are made with, in `<kind>.json`.

    Args:
        fresh: remove the results that are there; what somebody else put there stays.
        free: settings that may differ from those of the results that are there: what else is run.

    Raises:
        ValueError: there are results made with other settings, or of another kind.
        CheckpointError: a checkpoint to be removed holds what is not the run's.
    """
    if fresh:
        _clear(out)
    else:
        check_settings(out, kind, settings, free)
    write_whole(out / f"{kind}.json", json.dumps(settings, indent=1))


def check_settings(out: Path, kind: str, settings: dict[str, Any], free: Sequence[str]) -> None:
    """Raise ValueError if results in `out` were made with other settings, or are no `kind`'s."""
    if not unit_names(out):
        return
    path = out / f"{kind}.json"
    if not path.exists():
        raise ValueError(
            f"{printable(out)}: holds results of something else; expected another --out"
        )
    there, wanted = read_json(path), json.loads(json.dumps(settings))
    if not isinstance(there, dict):
        raise ValueError(f"{printable(path)}: expected the settings of the results there")
    if any(there.get(name) != wanted.get(name) for name in {*there, *wanted}.difference(free)):
        raise ValueError(
            f"{printable(out)}: holds results of other settings; expected the same ones, another "
            "--out, or --fresh"
        )


def _clear(out: Path) -> None:
    seeds = [out / name for name in unit_names(out)]
    units = [path for seed in seeds for path in seed.iterdir() if path.is_dir()]
    for unit in units:
        if (unit / RESULT_FILE).exists() and not is_run(unit):
            raise ValueError(
                f"{printable(unit)}: its result is not of a run here; expected another --out"
            )
    for unit in units:
        delete_run(unit)
    for seed in seeds:
        remove_if_empty(seed)
    (out / "cost.json").unlink(missing_ok=True)
