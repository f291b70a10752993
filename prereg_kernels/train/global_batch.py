# SPDX-License-Identifier: Apache-2.0
"""The samples of a step, however many ranks share them; and which checkpoints that allows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import printable, read_json

BATCH = "batch.json"
"""In a checkpoint: the samples of a step, the ranks, and the engine that it was written by."""
_OF_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def samples_of_step(arguments: Any) -> int:
    """On all ranks, in all micro-batches: with the seed and the epoch, they say the order."""
    ranks = arguments.train_batch_size * arguments.world_size
    return int(ranks * arguments.gradient_accumulation_steps)


def describe_batch(trainer: Any) -> dict[str, Any]:
    """What `BATCH` holds."""
    engine = (
        "DeepSpeed"
        if trainer.is_deepspeed_enabled
        else "FSDP"
        if trainer.is_fsdp_enabled
        else "DDP"
    )
    ranks = trainer.args.world_size
    return {"samples": samples_of_step(trainer.args), "ranks": ranks, "engine": engine}


def check_checkpoint(path: Path, trainer: Any) -> None:
    """Raise ValueError where a checkpoint cannot be gone on from as the run is started now."""
    now, file = describe_batch(trainer), path / BATCH
    was = read_json(file) if file.is_file() else now
    place = printable(path)
    if was["samples"] != now["samples"]:
        arguments = trainer.args
        raise ValueError(
            f"per_device_train_batch_size: {place} is of steps of {was['samples']} samples, which "
            f"the order of the samples depends on; got {arguments.train_batch_size} x "
            f"{arguments.world_size} ranks x {arguments.gradient_accumulation_steps} "
            f"gradient_accumulation_steps = {now['samples']}; change these to make it "
            f"{was['samples']}, or begin anew by --fresh"
        )
    if was["engine"] != now["engine"]:
        raise ValueError(
            f"{place}: {was['engine']} has written it; expected a start with the same, got "
            f"{now['engine']}, or --fresh"
        )
    if now["engine"] == "DeepSpeed" and was["ranks"] != now["ranks"]:
        raise ValueError(
            f"{place}: DeepSpeed reads its checkpoints on as many ranks as wrote them; expected "
            f"{was['ranks']}, got {now['ranks']}"
        )


def without_batch(settings: Any) -> Any:
    """Settings but for those that may change with the number of ranks, as the batch stays."""
    if isinstance(settings, Mapping):
        items = settings.items()
        return {name: without_batch(x) for name, x in items if name not in _OF_BATCH}
    return [without_batch(x) for x in settings] if isinstance(settings, list | tuple) else settings
