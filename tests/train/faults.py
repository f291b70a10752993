# SPDX-License-Identifier: Apache-2.0
"""What befalls a rank: FAULTS is a list of "RANK WHAT WHERE", such as "1 kill step-3".

Where, with the step's number: before a step; in a checkpoint before the model, before a rank's
random state, before and after its files are put on the disk, after it has its name. All in the
stage "tune": the first in the first start, the second in the second. MARKERS has a file of each,
and of each start of rank 0 one, which says what it found of checkpoints. READ-RANK there has the
samples that were read, a line a number.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from prereg_kernels.train import trainer as trainer_module
from prereg_kernels.train.order import Mixture
from prereg_kernels.train.trainer import RecipeTrainer


def raise_(error: BaseException) -> None:
    raise error


ACTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "value": lambda: raise_(ValueError("a bad sample")),
    "memory": lambda: raise_(RuntimeError("CUDA out of memory")),
    "disk": lambda: raise_(OSError(errno.ENOSPC, "No space left on device", "file")),
    "nan": lambda: poisoned.append(True),
}
poisoned: list[bool] = []
"""Holds one where the next loss is to be NaN."""


def reach(where: str) -> None:
    """A place; what is to happen there does."""
    markers = Path(os.environ["MARKERS"])
    starts = len(list(markers.glob("START-*")))
    for number, name in enumerate(os.environ["FAULTS"].split(", "), 1):
        rank, what, at = name.split()
        marker = markers / name
        is_here = (rank, at) == (os.environ.get("RANK", "0"), where)
        if number == starts and is_here and not marker.exists():
            marker.touch()
            ACTS[what]()


class Steps(TrainerCallback):
    """Reaches steps, and the end of a checkpoint."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith("tune"):
            reach(f"step-{state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith("tune"):
            reach(f"saved-{state.global_step}")


def before(method: str, place: str) -> None:
    """Reach a place before a method of the trainer, within a checkpoint."""
    run = getattr(RecipeTrainer, method)

    def reaching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_writing and self.args.output_dir.endswith("tune"):
            reach(f"{place}-{self.state.global_step}")
        return run(self, *args, **kwargs)

    setattr(RecipeTrainer, method, reaching)


def install() -> None:
    """Put them into the trainer."""
    rank, markers = os.environ.get("RANK", "0"), Path(os.environ["MARKERS"])
    before("save_model", "model")
    before("_save_rng_state", "random")
    make, flush, get = RecipeTrainer.__init__, trainer_module.flush, Mixture.__getitems__
    compute = RecipeTrainer.compute_loss

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_callback(Steps())

    def reaching_flush(folder: Path) -> None:
        step = folder.name.rpartition("-")[2]
        reach(f"flush-{step}")
        flush(folder)
        reach(f"flushed-{step}")

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * math.nan if poisoned and poisoned.pop() else loss

    def reading(self: Any, numbers: Any) -> Any:
        with (markers / f"READ-{rank}").open("a") as file:
            file.writelines(f"{number}\n" for number in numbers)
        return get(self, numbers)

    RecipeTrainer.__init__, RecipeTrainer.compute_loss = init, compute_loss
    trainer_module.flush, Mixture.__getitems__ = reaching_flush, reading
    if rank == "0":
        out = Path(sys.argv[sys.argv.index("train") + 1]).with_suffix("")
        found = {
            path.name: sorted(str(file.relative_to(path)) for file in path.rglob("*"))
            for path in (out / "stages/tune").glob("checkpoint-*")
        }
        number = len(list(markers.glob("START-*")))
        (markers / f"START-{number}").write_text(json.dumps(found))
