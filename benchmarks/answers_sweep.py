"""Do answers improve anywhere? Baseline and PRe over settings and paired seeds, answers only.

    python benchmarks/answers_sweep.py [NAME ...]     # all settings, or those named

Appends to benchmarks/results/answers_sweep.json what is not there yet; `--table` prints it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "answers_sweep.json"
SEEDS = 3


def settings() -> dict[str, Any]:
    """{name: RunConfig with PRe}: each differs from the demo's in what its name says."""
    from prereg_kernels.training.config import TowerConfig, load_config
    from prereg_kernels.training.experiment import ExperimentConfig

    preset = files("prereg_kernels.training") / "presets" / "scenes.yaml"
    demo = load_config(Path(str(preset)), ExperimentConfig).run
    # longer than the demo's own: 400 steps, and a tower of 1000
    last = replace(demo.stages[-1], steps=380)
    demo = replace(demo, stages=(*demo.stages[:-1], last), tower=TowerConfig())

    def stages(**changes: Any) -> dict[str, Any]:
        return {"stages": (*demo.stages[:-1], replace(last, **changes))}

    def pre(**changes: Any) -> dict[str, Any]:
        return {"pre": replace(demo.pre, **changes)}

    rare = {family: 1.0 for family in demo.families} | {"comparison": 0.06, "count": 0.06}
    found = {
        "demo": {},
        "weight 0.5": pre(weight=0.5),
        "weight 5": pre(weight=5.0),
        "layer 2": pre(layer=2),
        "layer 4": pre(layer=4),
        "layer 6 (last)": pre(layer=6),
        "200 steps": stages(steps=180),
        "1000 steps": stages(steps=980),
        "count and comparison rare (2%)": {"families": rare},
        "512 training scenes": {"distinct_scenes": 512},
        "512 training scenes, 1000 steps": {"distinct_scenes": 512, **stages(steps=980)},
        "bf16": {"precision": "bf16"},
    }
    return {name: replace(demo, **changes) for name, changes in found.items()}


def run(name: str, seed: int, use_pre: bool, cache: str) -> dict[str, Any]:
    """Train and evaluate one model."""
    import torch

    from prereg_kernels.training.evaluation import evaluate
    from prereg_kernels.training.loop import train
    from prereg_kernels.training.questions import COMMON_FAMILIES
    from prereg_kernels.training.scenes import Scenes

    torch.set_num_threads(1)
    config = replace(settings()[name], seed=seed, checkpoint_every=10**6)
    stages = tuple(replace(stage, pre=stage.pre and use_pre) for stage in config.stages)
    config = replace(config, stages=stages)
    with tempfile.TemporaryDirectory() as out:
        trained = train(config, out, cache_dir=cache, progress=False, tensorboard=False)
        test = Scenes("test", seed, config.scenes)
        found = evaluate(trained.model, trained.packer, test, COMMON_FAMILIES, n_scenes=384)
    return {
        "setting": name,
        "seed": seed,
        "variant": "pre" if use_pre else "baseline",
        "accuracy": found.accuracy,
        "mean_accuracy": found.mean_accuracy,
        "lm_loss": found.lm_loss,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown: per setting the means over seeds and the paired difference with its interval."""
    from prereg_kernels.training.summary import Effect

    print("| setting | baseline | PRe | difference (points, 95% interval) | per family |")
    print("|---|---|---|---|---|")
    for name in dict.fromkeys(row["setting"] for row in rows):

        def values(variant: str, family: str | None = None, name: str = name) -> list[float]:
            mine = [r for r in rows if r["setting"] == name and r["variant"] == variant]
            mine.sort(key=lambda r: r["seed"])
            return [r["accuracy"][family] if family else r["mean_accuracy"] for r in mine]

        effect = Effect.of(values("baseline"), values("pre"))
        families = ", ".join(
            f"{family} {100 * e.difference.mean:+.1f} ± {100 * e.half_width:.1f}"
            for family in rows[0]["accuracy"]
            for e in [Effect.of(values("baseline", family), values("pre", family))]
        )
        print(
            f"| {name} | {100 * effect.before.mean:.1f} | {100 * effect.after.mean:.1f} | "
            f"{100 * effect.difference.mean:+.1f} ± {100 * effect.half_width:.1f} | {families} |"
        )


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*settings(), []])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--cache", default="runs/scenes/cache", help="where trained towers are")
    arguments = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    if arguments.table:
        return print_table(stored["runs"])
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = {(r["setting"], r["seed"], r["variant"]) for r in stored["runs"]}
    todo = [
        (name, seed, use_pre)
        for name in arguments.names or settings()
        for seed in range(SEEDS)
        for use_pre in (False, True)
        if (name, seed, "pre" if use_pre else "baseline") not in done
    ]
    import torch

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    with pool:
        jobs = [pool.submit(run, *job, arguments.cache) for job in todo]
        for job in jobs:
            row = job.result() | {"commit": commit, "torch": torch.__version__, "device": "cpu"}
            print(*(row[key] for key in ("setting", "seed", "variant", "mean_accuracy")), sep=", ")
            stored["runs"].append(row)
            RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
