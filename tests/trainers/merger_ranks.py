# SPDX-License-Identifier: Apache-2.0
"""Two processes with a merger's rows as the anchor, each with images of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from prereg_kernels import apply_pre
from tests.trainers import processes
from tests.zoo import sample

SCENES = ("images", "videos")  # of a rank each
NAMES = ("qwen2_5_vl", "qwen3_vl")


def sharded(name: str, rank: int, checkpointing: bool) -> Any:
    """Gradients under FSDP2, whole: a unit for the merger, and for each layer of the encoder."""
    case = sample(name)
    model, inputs = case.model, case.batches[SCENES[rank]].inputs
    pre = apply_pre(model, anchor="pre_projector")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    visual = model.model.visual
    for unit in (*visual.blocks, visual.merger, *model.model.language_model.layers):
        fully_shard(unit)
    fully_shard(model)
    model(**inputs).loss.backward()
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    return found, pre.metrics()


def work(rank: int, port: int, out: Path) -> None:
    """Go through the models, and write what each gives."""
    processes.enter(rank, port, len(SCENES))
    dist.init_process_group("gloo")
    for name in NAMES:
        for checkpointing in (False, True):
            found = sharded(name, rank, checkpointing)
            torch.save(found, out / f"{name} {checkpointing} {rank}.pt")
    processes.leave()
