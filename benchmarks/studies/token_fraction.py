# SPDX-License-Identifier: Apache-2.0
"""What a fraction of the visual tokens costs, and what it still does: the scenes experiment.

    python -m benchmarks.studies.token_fraction             # about 9 minutes on two cores
    python -m benchmarks.studies.token_fraction --table     # prints what is there

Trains the demo's model without PRe and with it on all, a half and a quarter of the visual tokens,
on paired seeds; times their training steps in turn, in one process; writes
benchmarks/results/token_fraction.json.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.report import RESULTS, made_on, write_json
from benchmarks.studies.demo_run import demo_run
from prereg_kernels._util.machine import describe_machine

OUT = RESULTS / "token_fraction.json"
BASELINE, FRACTIONS = "baseline", (1.0, 0.5, 0.25)
VARIANTS = (BASELINE, *map(str, FRACTIONS))
WARMUP_STEPS, TIMED_STEPS = 3, 30
SCENES = 256  # that a probe is fitted on, and as many that it is judged by


def run_config(variant: str, seed: int, steps: int | None) -> Any:
    """The demo's run with a fraction, or without PRe; `steps`: of the last stage, None: its own."""
    fraction = None if variant == BASELINE else {"token_fraction": float(variant)}
    return demo_run(seed, fraction, steps)


def train_and_probe(variant: str, seed: int, steps: int | None, cache: str) -> dict[str, Any]:
    """{"layer 3": mean probe accuracy of the unasked attributes there, ...} of a trained model."""
    from prereg_kernels.demo.experiment.summary import unasked
    from prereg_kernels.demo.loop import train
    from prereg_kernels.demo.measure import measure

    torch.set_num_threads(1)
    run = run_config(variant, seed, steps)
    with tempfile.TemporaryDirectory() as out:
        trained = train(run, out, cache_dir=cache, progress=False, tensorboard=False)
    train_scenes, test_scenes = (run.scenes.open(split, seed) for split in ("train", "test"))
    found = measure(
        trained.model, train_scenes, test_scenes, train_scenes=SCENES, test_scenes=SCENES
    )
    layers = (run.pre.layer, run.model.decoder_layers)
    probes = {f"layer {layer}": unasked(layer)(found) for layer in layers}
    return {"variant": variant, "seed": seed, **probes}


def step_times(cache: str) -> dict[str, list[float]]:
    """{variant: seconds of each training step}, all variants in turn, one thread."""
    from prereg_kernels.demo.loop import Stepper

    torch.set_num_threads(1)
    steppers = {}
    for variant in VARIANTS:
        run = run_config(variant, 0, None)
        steppers[variant] = Stepper(replace(run, stages=run.stages[-1:]), cache)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for step in range(WARMUP_STEPS + TIMED_STEPS):
        for variant, stepper in steppers.items():
            seconds = stepper.timed_step(step)
            if step >= WARMUP_STEPS:
                times[variant].append(seconds)
    return times


def format_table(stored: dict[str, Any]) -> str:
    """Markdown: step time, and probes with their paired differences to the baseline."""
    from prereg_kernels.checkup.words import plus_minus
    from prereg_kernels.demo.experiment.summary import Effect

    times, rows = stored["step_seconds"], stored["runs"]
    layers = [name for name in rows[0] if name.startswith("layer")]
    heads = " ".join(f"{x} (%) |" for x in layers)
    lines = [f"| token_fraction | step (ms) | over the baseline | {heads}"]
    lines.append("|---|---|---|" + "---|" * len(layers))

    def values(variant: str, layer: str) -> list[float]:
        mine = sorted((r for r in rows if r["variant"] == variant), key=lambda r: r["seed"])
        return [row[layer] for row in mine]

    for variant in VARIANTS:
        ratios = [b / a - 1 for a, b in zip(times[BASELINE], times[variant], strict=True)]
        error = statistics.stdev(ratios) / math.sqrt(len(ratios))
        cells = [f"{1000 * statistics.median(times[variant]):.1f}"]
        cells.append(f"{100 * statistics.median(ratios):+.1f}% ± {100 * error:.1f}%")
        for layer in layers:
            effect = Effect.of(values(BASELINE, layer), values(variant, layer))
            interval = f" ({plus_minus(effect.difference, 100, '.1f')})"
            cells.append(f"{100 * effect.after.value:.1f}" + interval * (variant != BASELINE))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines.append(
        '\nSteps of all rows were taken in turn; "over the baseline" is the median of the paired '
        "ratios. A layer's column is the mean accuracy there of linear probes of properties that "
        f"no question asks about, over {stored['seeds']} paired seeds; PRe is at {layers[0]}. "
        "After ± is the standard error of the time, and half the 95% t interval of the "
        "difference to the baseline. "
        f"{made_on(stored['machine'])}."
    )
    return "\n".join(lines)


def main() -> None:
    """Run everything, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the last stage; by default the demo's")
    parser.add_argument("--cache", default="runs/scenes/cache", help="where trained towers are")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return print(format_table(json.loads(arguments.out.read_text())))
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as alone:  # first, as it trains the tower for all
        times = alone.submit(step_times, arguments.cache).result()
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        jobs = [
            pool.submit(train_and_probe, variant, seed, arguments.steps, arguments.cache)
            for seed in range(arguments.seeds)
            for variant in VARIANTS
        ]
        rows = [job.result() for job in jobs]
    stored = {
        "seeds": arguments.seeds,
        "machine": describe_machine(torch.device("cpu"), None),
        "step_seconds": times,
        "runs": rows,
    }
    write_json(stored, arguments.out)
    print(format_table(stored))


if __name__ == "__main__":
    main()
