# SPDX-License-Identifier: Apache-2.0
"""Whether PRe gives anything in two more ways that trainers train a model on: their full tuning,
which freezes the projector, and LoRA that adapts the projector, too.

    python -m benchmarks.studies.tuning --workers 2    # 25 runs on two cores

As the study of adapters, whose trained model goes on here with other seeds. Full tuning is that of
LLaMA-Factory and ms-swift by default: all of the decoder trains, and neither tower nor projector.
LoRA on the projector is ms-swift's `freeze_aligner: false`. Every run is written into the results
as it ends; what is there is not run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.common.report import RESULTS
from benchmarks.studies import adapters
from benchmarks.studies.adapters import (
    RANK,
    TARGETS,
    run_config,
    train_and_ask,
    train_last,
    with_adapter,
)
from benchmarks.studies.demo_run import run_missing

OUT = RESULTS / "tuning.json"
SEEDS = range(900, 905)  # no other study has them
BOTH = rf"{TARGETS}|.*multi_modal_projector\.linear_[12]"


@dataclass(frozen=True)
class Tuning:
    """How a trained model goes on.

    Attributes:
        adapts: LoRA on the decoder and the projector; else all of the decoder trains.
        anchor: of PRe; None: without PRe.
    """

    adapts: bool
    anchor: str | None = None


VARIANTS: Mapping[str, Tuning | None] = {
    "no more training": None,
    "decoder": Tuning(adapts=False),
    "decoder, PRe": Tuning(adapts=False, anchor="pre_projector"),
    "adapter on both": Tuning(adapts=True),
    "adapter on both, PRe": Tuning(adapts=True, anchor="pre_projector"),
}
COMPARED = {
    "decoder": "no more training",
    "decoder, PRe": "decoder",
    "adapter on both": "no more training",
    "adapter on both, PRe": "adapter on both",
}
"""{a variant: the one that it is compared with}"""


def tune(model: Any, run: Any, tuning: Tuning) -> Any:
    """The last stage of a run; returns the model, with an adapter merged."""
    from prereg_kernels.demo.model.llava import set_trainable

    if not tuning.adapts:
        set_trainable(model, ["llm"])
        train_last(model, run, tuning.anchor)
        return model
    adapted = with_adapter(model, run, BOTH)
    train_last(model, run, tuning.anchor)
    return adapted.merge_and_unload()


def format_table(stored: dict[str, Any]) -> str:
    """Markdown: a variant a row, its levels and the differences to what it is compared with."""
    what = (
        f"Decoder: all of it trains. Adapter on both: LoRA of rank {RANK} on all of the decoder "
        "and on the projector"
    )
    return adapters.format_table(stored, COMPARED, what)


def main() -> None:
    """Run what is missing, or print what is there."""

    def todo(seeds: range) -> list[tuple[str, int]]:
        return [(variant, seed) for seed in seeds for variant in VARIANTS]

    def towers() -> list[Any]:
        return [run_config(SEEDS[0])]

    measure = partial(train_and_ask, variants=VARIANTS, go_on=tune)
    run_missing(__doc__, SEEDS, OUT, todo, towers, measure, format_table)


if __name__ == "__main__":
    main()
