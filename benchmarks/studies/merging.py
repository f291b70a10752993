# SPDX-License-Identifier: Apache-2.0
"""Whether PRe gives what it gives a LLaVA where the projector merges patches, as Qwen-VL's does.

    python -m benchmarks.studies.merging --workers 2    # 18 runs on two cores

The demo's model, with patches of half the side and a projector that joins 2 x 2 of them into a
token (LayerNorm, joining, two matrices, as Qwen2-VL's merger, arXiv 2409.12191). So the decoder has
as many visual tokens as the demo's, and the encoder's output is four times as wide for each. It is
trained without PRe, and with either anchor; then it learns new kinds of question from 64 scenes.
Every run is written into the results as it ends; what is there is not run again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.report import RESULTS, made_on
from benchmarks.studies.demo_run import BASELINE, Row, demo_run, run_missing
from prereg_kernels import Family, apply_pre, remove_pre
from prereg_kernels._util.machine import describe_machine
from prereg_kernels.demo.data.questions import COMMON_FAMILIES
from prereg_kernels.demo.data.scenes import SceneConfig

OUT = RESULTS / "merging.json"
SEEDS = range(600, 606)  # no other study has them
TEST = 512  # scenes, a question of each family about each
MERGE = 2  # patches of a token, per side
VARIANTS: Mapping[str, Mapping[str, Any] | None] = {
    BASELINE: None,
    "pre_projector": {"anchor": "pre_projector"},
    "pre_llm": {"anchor": "pre_llm"},
}
FAMILY = Family(
    "merging LLaVA", projector="model.multi_modal_projector.1", joins_rows=True, images="equal",
    counted_by=("pixel_values",), visual_tokens=("image_token_id",),
)  # fmt: skip


@dataclass(frozen=True)
class MergedScenes(SceneConfig):
    """The demo's scenes in patches of half the side."""

    patch_size: int = 4

    @property
    def patches(self) -> int:
        """Of an image, after merging: its visual tokens."""
        return super().patches // MERGE**2


class Blocks(nn.Module):
    """(images, side², D), row by row, to block by block of `MERGE` x `MERGE`."""

    def forward(self, x: Tensor) -> Tensor:
        """As Qwen-VL's processor orders its patches."""
        side = round(x.shape[1] ** 0.5) // MERGE
        blocks = x.unflatten(1, (side, MERGE, side, MERGE)).transpose(2, 3)
        return blocks.flatten(1, 4)


class Merger(nn.Module):
    """(images, k tokens, D) to (images, tokens, W), k = `MERGE`²."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        joined = MERGE**2 * width
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, out))

    def forward(self, x: Tensor) -> Tensor:
        """As Qwen2-VL's."""
        joined: Tensor = self.norm(x).unflatten(1, (-1, MERGE**2)).flatten(2)
        out: Tensor = self.mlp(joined)
        return out


def run_config(variant: str, seed: int, steps: int | None = None) -> Any:
    """The demo's run of a variant; `steps`: of the last stage, None: its own."""
    return replace(demo_run(seed, VARIANTS[variant], steps), scenes=MergedScenes())


def merging_model(run: Any, cache: str) -> Any:
    """The model that a run begins with: its tower trained, the merger and the decoder not."""
    from prereg_kernels.demo.model.tower import new_model

    model = new_model(run, cache)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        merger = Merger(run.model.width, run.model.width)
    model.model.multi_modal_projector = nn.Sequential(Blocks(), merger)
    return model


def train(model: Any, run: Any) -> None:
    """All stages of a run, in memory."""
    from prereg_kernels.demo.stages import train_stage

    for index, stage in enumerate(run.stages):
        pre = None
        if stage.pre:
            settings = {"layers": run.pre.layer, "weight": run.pre.weight, "seed": run.seed}
            pre = apply_pre(model, family=FAMILY, anchor=run.pre.anchor, **settings)
        train_stage(model, run, index, pre)
        if pre is not None:
            remove_pre(model)


def train_and_ask(
    variant: str,
    seed: int,
    steps: int | None,
    cache: str,
    new: Callable[[Any, str], Any] = merging_model,
) -> Row:
    """What the variant's model answers, and what copies of it answer that have learned more.

    Args:
        new: makes the model that the run begins with, of a run and of the towers' folder.
    """
    from prereg_kernels.cli.demo import load_sweep
    from prereg_kernels.demo.data.packing import Packer, build_tokenizer
    from prereg_kernels.demo.evaluation import evaluate
    from prereg_kernels.demo.experiment.transfer import lesson_run, lessons

    torch.set_num_threads(1)
    run = run_config(variant, seed, steps)
    model = new(run, cache)
    train(model, run)
    packer = Packer(build_tokenizer(run.scenes), run.scenes.patches)
    test = run.scenes.open("test", seed)

    def ask(learner: Any, families: tuple[str, ...]) -> Any:
        return evaluate(learner, packer, test, families, n_scenes=TEST).accuracy

    learned: dict[str, dict[str, float]] = {}
    transfer = load_sweep("scenes").experiment.transfer
    for lesson in lessons(transfer):
        learner = copy.deepcopy(model)
        train(learner, lesson_run(run, transfer, lesson, Path()))
        learned.setdefault(lesson.frozen, {}).update(ask(learner, (lesson.family,)))
    return {
        "variant": variant,
        "seed": seed,
        "accuracy": ask(model, COMMON_FAMILIES),
        "transfer": learned,
        "machine": describe_machine(torch.device("cpu"), None),
    }


MEASURES: Mapping[str, Callable[[Row], Mapping[str, float]]] = {
    "new questions, tower and projector frozen": lambda row: row["transfer"]["projector"],
    "new questions, the projector trained too": lambda row: row["transfer"]["nothing"],
    "the training's own questions": lambda row: row["accuracy"],
}


def format_table(stored: dict[str, Any]) -> str:
    """Markdown: a measure a row, the baseline's level and the differences to it."""
    from prereg_kernels.checkup.words import plus_minus
    from prereg_kernels.demo.experiment.summary import Effect, holm

    rows: dict[str, dict[int, Row]] = {name: {} for name in VARIANTS}
    for row in stored["runs"]:
        rows[row["variant"]][row["seed"]] = row
    seeds = sorted(set.intersection(*(set(found) for found in rows.values())))
    after = [name for name in VARIANTS if name != BASELINE]
    effects = {
        (measure, name): Effect.of(
            *([fmean(get(rows[x][seed]).values()) for seed in seeds] for x in (BASELINE, name))
        )
        for measure, get in MEASURES.items()
        for name in after
    }
    sure = dict(zip(effects, holm([e.p_value for e in effects.values()]), strict=True))
    lines = [f"| | {BASELINE} | {' | '.join(after)} |", "|---" * (2 + len(after)) + "|"]
    for measure in MEASURES:
        cells = []
        for name in after:
            difference = effects[measure, name].difference
            mark = "\\*" * (difference.direction != 0) + "\\*" * sure[measure, name]
            cells.append(f"{plus_minus(difference, 100, '.1f')} {mark}".strip())
        level = 100 * effects[measure, after[0]].before.value
        lines.append(f"| {measure} | {level:.1f} | {' | '.join(cells)} |")
    made = dict.fromkeys(made_on(row["machine"]) for row in stored["runs"])
    lines += [
        "",
        f"Percent right on {TEST} held-out scenes, {len(seeds)} paired seeds; after ± half the 95% "
        "t interval of the difference. PRe: layer 4 of 6, weight 0.5. \\*: the interval excludes "
        f"0. \\*\\*: still clear after Holm's correction for all {len(effects)}. "
        f"{'; '.join(made)}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print what is there."""

    def todo(seeds: range) -> list[tuple[str, int]]:
        return [(variant, seed) for seed in seeds for variant in VARIANTS]

    def towers() -> list[Any]:
        return [run_config(BASELINE, SEEDS[0])]

    run_missing(__doc__, SEEDS, OUT, todo, towers, train_and_ask, format_table)


if __name__ == "__main__":
    main()
