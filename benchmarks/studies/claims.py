# SPDX-License-Identifier: Apache-2.0
"""The paper's claim, harder tasks answered better, at the demo's size: each where it may hold.

    python -m benchmarks.studies.claims --workers 2    # 36 runs on two cores

Trains the demo's model without PRe and with it, at the demo's setting, on what is harder than the
demo: clutter, faint digits, a prior that misleads, more digits than in training, a tower that
trains too, a deeper decoder. Then it asks questions of the training's own kinds on held-out scenes.
Every run is written into the results as it ends; what is there is not run again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common.report import RESULTS, made_on
from benchmarks.studies.demo_run import BASELINE, demo_run, run_missing
from prereg_kernels._util.machine import describe_machine
from prereg_kernels.demo.data.draws import Draws
from prereg_kernels.demo.data.questions import BIASED_PRESENCE, COMMON_FAMILIES
from prereg_kernels.demo.data.scenes import SceneConfig, Scenes

OUT = RESULTS / "claims.json"
SEEDS = range(500, 503)  # no other study has them
TEST = 512  # scenes, a question of each family about each
PRE = "PRe"


@dataclass(frozen=True)
class FaintConfig(SceneConfig):
    """Scenes whose tiles let the ground shine through.

    Attributes:
        opacity: of a tile, in (0, 1].
    """

    opacity: float = 0.3

    def open(self, split: str, seed: int = 0) -> Scenes:
        """The scenes of a split."""
        return FaintScenes(split, seed, self)


class FaintScenes(Scenes):
    """The scenes of a `FaintConfig`."""

    def _paste(
        self,
        draws: Draws,
        images: NDArray[np.float32],
        masks: NDArray[np.int64],
        counts: NDArray[np.int64],
        fields: dict[str, NDArray[np.int64]],
    ) -> None:
        assert isinstance(self.config, FaintConfig)
        ground = images.copy()
        super()._paste(draws, images, masks, counts, fields)
        images[:] = ground + np.float32(self.config.opacity) * (images - ground)


@dataclass(frozen=True)
class Condition:
    """What is harder.

    Attributes:
        scenes: what is seen in training.
        test: what is seen in the test, where that differs.
        families: of the training's questions.
        trainable: parts that train in the second stage.
        layers: of the decoder.
        layer: PRe's.
        asked: families that the prediction is about.
    """

    scenes: SceneConfig = field(default_factory=SceneConfig)
    test: SceneConfig | None = None
    families: tuple[str, ...] = COMMON_FAMILIES
    trainable: tuple[str, ...] = ("projector", "llm")
    layers: int = 6
    layer: int = 4
    asked: tuple[str, ...] = COMMON_FAMILIES


CONDITIONS: Mapping[str, Condition] = {
    "clutter and noise": Condition(SceneConfig(clutter=1.0, noise=0.12), asked=("count", "read")),
    "faint digits": Condition(FaintConfig(), asked=("count", "read")),
    "85% yes in training": Condition(
        families=("count", "read", BIASED_PRESENCE, "comparison"), asked=("presence",)
    ),
    "2 to 4 digits in training, 5 to 7 in the test": Condition(
        SceneConfig(max_digits=4), SceneConfig(min_digits=5), asked=("count",)
    ),
    "the tower trains too": Condition(trainable=("tower", "projector", "llm")),
    "12 layers": Condition(layers=12, layer=8),
}


def variant_name(condition: str, pre: bool) -> str:
    """Of a run in the results."""
    return f"{condition}, {PRE if pre else BASELINE}"


VARIANTS = {variant_name(name, pre): (name, pre) for name in CONDITIONS for pre in (False, True)}


def run_config(variant: str, seed: int, steps: int | None = None) -> Any:
    """The demo's run of a variant; `steps`: of the last stage, None: its own."""
    name, pre = VARIANTS[variant]
    wanted = CONDITIONS[name]
    run = demo_run(seed, {} if pre else None, steps)
    last = replace(run.stages[-1], trainable=wanted.trainable)
    return replace(
        run,
        scenes=wanted.scenes,
        model=replace(run.model, decoder_layers=wanted.layers),
        stages=(*run.stages[:-1], last),
        pre=replace(run.pre, layer=wanted.layer),
        families=dict.fromkeys(wanted.families, 1.0),
    )


def train_and_ask(variant: str, seed: int, steps: int | None, cache: str) -> dict[str, Any]:
    """What the variant's model answers: {family: share of right answers}, and its loss."""
    from prereg_kernels.demo.evaluation import evaluate
    from prereg_kernels.demo.loop import train

    torch.set_num_threads(1)
    run = run_config(variant, seed, steps)
    seen = CONDITIONS[VARIANTS[variant][0]].test or run.scenes
    with tempfile.TemporaryDirectory() as out:
        trained = train(run, out, cache_dir=cache, progress=False, tensorboard=False)
    answers = evaluate(
        trained.model, trained.packer, seen.open("test", seed), COMMON_FAMILIES, n_scenes=TEST
    )
    return {
        "variant": variant,
        "seed": seed,
        "accuracy": answers.accuracy,
        "majority": answers.majority,
        "lm_loss": answers.lm_loss,
        "machine": describe_machine(torch.device("cpu"), None),
    }


def format_table(stored: dict[str, Any]) -> str:
    """Markdown: a condition a row, with what is asked first."""
    from prereg_kernels.checkup.words import plus_minus
    from prereg_kernels.demo.experiment.summary import Effect, holm

    by_variant: dict[str, dict[int, Any]] = {}
    for row in stored["runs"]:
        by_variant.setdefault(row["variant"], {})[row["seed"]] = row
    effects: dict[tuple[str, str], Effect] = {}
    lines = [
        "| what is harder | seeds | asked | always the commonest | baseline | PRe − baseline | "
        "all four, baseline | PRe − baseline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cells: dict[str, list[str]] = {}
    for name, condition in CONDITIONS.items():
        before, after = (by_variant.get(variant_name(name, pre), {}) for pre in (False, True))
        seeds = sorted(before.keys() & after.keys())
        if len(seeds) < 2:
            continue
        commonest = fmean(before[s]["majority"][f] for s in seeds for f in condition.asked)
        cells[name] = [str(len(seeds)), " and ".join(condition.asked), f"{100 * commonest:.1f}"]
        if condition.asked == COMMON_FAMILIES:
            cells[name][1] = "all four"
        for what, families in (("asked", condition.asked), ("all", COMMON_FAMILIES)):
            effects[name, what] = Effect.of(
                *([fmean(x[s]["accuracy"][f] for f in families) for s in seeds]
                  for x in (before, after))
            )  # fmt: skip
    sure = dict(zip(effects, holm([e.p_value for e in effects.values()]), strict=True))
    for name, row in cells.items():
        for what in ("asked", "all"):
            effect = effects[name, what]
            mark = " \\*" * (effect.difference.direction != 0) + "\\*" * sure[name, what]
            row += [
                f"{100 * effect.before.value:.1f}",
                plus_minus(effect.difference, 100, ".1f") + mark,
            ]
        lines.append(f"| {name} | {' | '.join(row)} |")
    missing = [name for name in CONDITIONS if name not in cells]
    made = dict.fromkeys(made_on(row["machine"]) for row in stored["runs"])
    lines += [
        "",
        f"Percent right on {TEST} held-out scenes; after ± half the 95% t interval over paired "
        "seeds. PRe: weight 0.5, anchor pre_projector, at two thirds of the decoder's depth. "
        "\\*: the interval excludes 0. \\*\\*: still clear after Holm's correction for all "
        f"{len(effects)}. {'Not run: ' * bool(missing)}{', '.join(missing)}"
        f"{'. ' * bool(missing)}{'; '.join(made)}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print what is there."""

    def todo(seeds: range) -> list[tuple[str, int]]:
        return [(variant, seed) for seed in seeds for variant in VARIANTS]

    def towers() -> list[Any]:
        return [run_config(variant_name(name, False), SEEDS[0]) for name in CONDITIONS]

    run_missing(__doc__, SEEDS, OUT, todo, towers, train_and_ask, format_table)


if __name__ == "__main__":
    main()
