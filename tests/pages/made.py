# SPDX-License-Identifier: Apache-2.0
"""Directories with a checkup's page and a report's, of numbers that are made in seconds."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from prereg_kernels.checkup.measures.measure import DEMO, STATES, STRUCTURE
from prereg_kernels.checkup.measures.table import MEASURES
from prereg_kernels.cli.checkup import run
from prereg_kernels.cli.parser import make_parser
from prereg_kernels.demo.data.questions import COMMON_FAMILIES
from prereg_kernels.demo.data.scenes import PROPERTIES
from prereg_kernels.demo.experiment.experiment import VARIANTS, ExperimentConfig, units
from prereg_kernels.demo.experiment.report import write_report
from prereg_kernels.demo.metrics import METRICS_FILE
from prereg_kernels.demo.runs.runs import RESULT_FILE
from prereg_kernels.demo.training_checkup import CHECKUPS_FILE
from tests.checkup.pictures import save_folder, save_model, save_tokenizer
from tests.demo.tiny import tiny_run

LAYERS = 3  # of the tiny run's model, its input included
COST = {
    "step_seconds": {"baseline": 0.1, "pre": 0.102},
    "step_ratio": 1.02,
    "step_ratio_error": 0.004,
    "steps": 20,
    "device": "cpu",
    "peak_bytes": {"baseline": 2**29, "pre": 2**29 + 2**21},
}


def checkup_pages(place: Path) -> dict[str, Path]:
    """Pages of the command: two models with probes and structure, and one on plain photographs."""
    save_folder(place, 12, (64, 80))
    shutil.copytree(place / "images" / "dark", place / "photos")
    for name in ("baseline", "PRe"):
        save_model(place / name)
        save_tokenizer(place / name, "hello <image> look")
    compared = ["--compare", str(place / "PRe"), "--images", str(place / "images"), "--masks",
                str(place / "masks"), "--masks-are", "classes"]  # fmt: skip
    pages = {}
    for name, more in (("two", compared), ("plain", ["--images", str(place / "photos")])):
        out = ["--splits", "2", "--out", str(place / name)]
        arguments = make_parser().parse_args(["checkup", str(place / "baseline"), *more, *out])
        run(arguments, Console(quiet=True))
        pages[name] = place / name / "checkup.html"
    return pages


def report_page(out: Path) -> Path:
    """The page of an experiment whose runs are made up."""
    config = ExperimentConfig(run=tiny_run(), seeds=3)
    for unit in units(config):
        directory = unit.directory(out)
        directory.mkdir(parents=True)
        result = _result(unit.seed, unit.variant)
        (directory / RESULT_FILE).write_text(json.dumps(result))
        steps = [
            {"step": step, "stage": "all", "lm_loss": 2 / step, "pre_loss": -1 + 1 / step}
            for step in range(1, 31)
        ]
        (directory / METRICS_FILE).write_text("\n".join(map(json.dumps, steps)))
        checkups = [{**result, "step": step} for step in (10, 20, 30)]
        (directory / CHECKUPS_FILE).write_text("\n".join(map(json.dumps, checkups)))
    return write_report(config, COST, "1.0 min", out, Console(quiet=True))


def _result(seed: int, variant: str) -> dict[str, Any]:
    """What a unit leaves, of random numbers that a variant moves."""
    rng = random.Random(f"{seed} {variant}")
    base = 0.4 + 0.1 * list(VARIANTS).index(variant)

    def level() -> float:
        return base + 0.1 * rng.random()

    def over_depth() -> list[float]:
        return [level() for _ in range(LAYERS)]

    measures: dict[str, dict[str, list[float]]] = {STRUCTURE: {}, STATES: {}}
    for measure in MEASURES:
        if DEMO in measure.shown:
            measures[measure.group][measure.name] = over_depth()
    learned = {"accuracy": level(), "majority": 0.4, "lm_loss": level()}
    return {
        "seed": seed,
        "variant": variant,
        "accuracy": {family: level() for family in COMMON_FAMILIES},
        "majority": dict.fromkeys(COMMON_FAMILIES, 0.3),
        "mean_accuracy": level(),
        "lm_loss": level(),
        "probe": {name: over_depth() for name in PROPERTIES},
        "transfer": {
            frozen: {"64": {"tilt": learned, "texture": learned}}
            for frozen in ("projector", "nothing")
        },
        **measures,
    }
