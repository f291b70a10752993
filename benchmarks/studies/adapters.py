# SPDX-License-Identifier: Apache-2.0
"""Whether PRe gives anything where a trained model gets a LoRA adapter, as most people train.

    python -m benchmarks.studies.adapters --workers 2    # 30 runs on two cores

The demo's model is trained without PRe: it stands for a pretrained model, whose projector has lost
what no question asks. Then an adapter on all of its decoder trains as long again, on new scenes of
the same kind, without PRe and with it; the projector is frozen, as LLaMA-Factory and ms-swift have
it, or trains beside the adapter. The merged models learn new kinds of question from 64 scenes.
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

from benchmarks.common.report import RESULTS, made_on
from benchmarks.studies.demo_run import Row, demo_run, run_missing
from benchmarks.studies.merging import MEASURES, TEST
from prereg_kernels import apply_pre, remove_pre
from prereg_kernels._util.machine import describe_machine
from prereg_kernels.demo.data.questions import COMMON_FAMILIES

OUT = RESULTS / "adapters.json"
SEEDS = range(700, 705)  # no other study has them
RANK = 16
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Adapter:
    """What trains beside the adapter.

    Attributes:
        anchor: of PRe; None: without PRe.
        projector: whether the projector trains too.
    """

    anchor: str | None = None
    projector: bool = False


VARIANTS: Mapping[str, Adapter | None] = {
    "no adapter": None,
    "adapter": Adapter(),
    "adapter, PRe": Adapter("pre_projector"),
    "adapter, PRe with pre_llm": Adapter("pre_llm"),
    "adapter and projector": Adapter(projector=True),
    "adapter and projector, PRe": Adapter("pre_projector", projector=True),
}
COMPARED = {
    "adapter": "no adapter",
    "adapter, PRe": "adapter",
    "adapter, PRe with pre_llm": "adapter",
    "adapter and projector": "no adapter",
    "adapter and projector, PRe": "adapter and projector",
}
"""{a variant: the one that it is compared with}"""


def run_config(seed: int, steps: int | None = None) -> Any:
    """The demo's run without PRe, and then a stage for the adapter; `steps`: of the last two."""
    run = demo_run(seed, None, steps)
    return replace(run, stages=(*run.stages, replace(run.stages[-1], name="adapter")))


def with_adapter(model: Any, run: Any, targets: str = TARGETS) -> Any:
    """PEFT's around the model, in place: LoRA alone trains."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
        return get_peft_model(model, config)


def train_adapter(model: Any, run: Any, adapter: Adapter) -> Any:
    """The last stage of a run on an adapter; returns the model with the adapter merged."""
    adapted = with_adapter(model, run)
    model.model.multi_modal_projector.requires_grad_(adapter.projector)
    train_last(model, run, adapter.anchor)
    return adapted.merge_and_unload()


def train_last(model: Any, run: Any, anchor: str | None) -> None:
    """The last stage of a run on whatever of the model trains; no anchor: without PRe."""
    from prereg_kernels.demo.data.packing import Packer, build_tokenizer
    from prereg_kernels.demo.stages import StageSteps

    pre = None
    if anchor is not None:
        settings = {"layers": run.pre.layer, "weight": run.pre.weight, "seed": run.seed}
        pre = apply_pre(model, anchor=anchor, **settings)
    model.train()
    packer = Packer(build_tokenizer(run.scenes), run.scenes.patches)
    last = len(run.stages) - 1
    steps = StageSteps(model, packer, run, last, pre)
    for number in range(run.stages[last].steps):
        steps(number)
    if pre is not None:
        remove_pre(model)


def train_and_ask(
    variant: str,
    seed: int,
    steps: int | None,
    cache: str,
    variants: Mapping[str, Any] = VARIANTS,
    go_on: Callable[[Any, Any, Any], Any] = train_adapter,
) -> Row:
    """What the variant's model answers, and what copies of it answer that have learned more.

    Args:
        go_on: trains the model of a run on, as a variant that is not None says; returns it.
    """
    from prereg_kernels.cli.demo import load_sweep
    from prereg_kernels.demo.data.packing import Packer, build_tokenizer
    from prereg_kernels.demo.evaluation import evaluate
    from prereg_kernels.demo.experiment.transfer import lesson_run, lessons
    from prereg_kernels.demo.model.tower import new_model
    from prereg_kernels.demo.stages import train_stage

    torch.set_num_threads(1)
    run, chosen = run_config(seed, steps), variants[variant]
    model = new_model(run, cache)
    for index in range(len(run.stages) - 1):
        train_stage(model, run, index)
    if chosen is not None:
        model = go_on(model, run, chosen)
    packer = Packer(build_tokenizer(run.scenes), run.scenes.patches)
    test = run.scenes.open("test", seed)
    learned: dict[str, dict[str, float]] = {}
    transfer = load_sweep("scenes").experiment.transfer
    for lesson in lessons(transfer):
        learner = copy.deepcopy(model)
        train_stage(learner, lesson_run(run, transfer, lesson, Path()), 0)
        answers = evaluate(learner, packer, test, (lesson.family,), n_scenes=TEST)
        learned.setdefault(lesson.frozen, {}).update(answers.accuracy)
    return {
        "variant": variant,
        "seed": seed,
        "accuracy": evaluate(model, packer, test, COMMON_FAMILIES, n_scenes=TEST).accuracy,
        "transfer": learned,
        "machine": describe_machine(torch.device("cpu"), None),
    }


def format_table(
    stored: dict[str, Any],
    compared: Mapping[str, str] = COMPARED,
    what: str = f"LoRA of rank {RANK} on all of the decoder",
) -> str:
    """Markdown: a variant a row, its levels and the differences to what it is compared with.

    Args:
        what: trains on, for the line below the table.
    """
    from prereg_kernels.checkup.words import plus_minus
    from prereg_kernels.demo.experiment.summary import Effect, holm

    first = next(iter(compared.values()))
    rows: dict[str, dict[int, Row]] = {name: {} for name in (first, *compared)}
    for row in stored["runs"]:
        rows[row["variant"]][row["seed"]] = row
    seeds = sorted(set.intersection(*(set(found) for found in rows.values())))

    def levels(measure: str, name: str) -> list[float]:
        return [fmean(MEASURES[measure](rows[name][seed]).values()) for seed in seeds]

    effects = {
        (measure, name): Effect.of(levels(measure, before), levels(measure, name))
        for name, before in compared.items()
        for measure in MEASURES
    }
    sure = dict(zip(effects, holm([e.p_value for e in effects.values()]), strict=True))
    lines = [
        f"| | compared with | {' | '.join(f'{x} | difference' for x in MEASURES)} |",
        "|---" * (2 + 2 * len(MEASURES)) + "|",
    ]
    for name in rows:
        cells = [name, compared.get(name, "")]
        for measure in MEASURES:
            cells.append(f"{100 * fmean(levels(measure, name)):.1f}")
            found = effects.get((measure, name))
            if found is None:
                cells.append("")
                continue
            mark = "\\*" * (found.difference.direction != 0) + "\\*" * sure[measure, name]
            cells.append(f"{plus_minus(found.difference, 100, '.1f')} {mark}".strip())
        lines.append(f"| {' | '.join(cells)} |")
    made = dict.fromkeys(made_on(row["machine"]) for row in stored["runs"])
    lines += [
        "",
        f"Percent right on {TEST} held-out scenes, {len(seeds)} paired seeds; after ± half the 95% "
        f"t interval of the difference. {what}; PRe: layer 4 of 6, weight 0.5, anchor "
        "pre_projector or as said. \\*: the interval excludes 0. \\*\\*: "
        f"still clear after Holm's correction for all {len(effects)}. {'; '.join(made)}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print what is there."""

    def todo(seeds: range) -> list[tuple[str, int]]:
        return [(variant, seed) for seed in seeds for variant in VARIANTS]

    def towers() -> list[Any]:
        return [run_config(SEEDS[0])]

    run_missing(__doc__, SEEDS, OUT, todo, towers, train_and_ask, format_table)


if __name__ == "__main__":
    main()
