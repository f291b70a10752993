# SPDX-License-Identifier: Apache-2.0
"""A step with Accelerate, as its launcher starts it: `accelerate_step.py OUT CASE`.

Each rank leaves what kind of run it was, the gradients as they were reduced over the ranks, and the
heads before the step.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, init_empty_weights
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor

from prereg_kernels import apply_pre
from tests.tiny import tiny_llava
from tests.trainers import deepspeed_ranks, on_cpus, ranks
from tests.trainers.rows import WEIGHT, collate


def main(out: Path, case: str) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        on_cpus.install()
    rank = int(os.environ["RANK"])
    # Before there is a DeepSpeed configuration: with ZeRO-3's, transformers draws other weights
    with on_rank(rank, case):
        model = tiny_llava()
        ranks.freeze_vision(model)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(kwargs_handlers=[unused])
    told = str(accelerator.distributed_type)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        force_fsdp()
    elif AcceleratorState().deepspeed_plugin is not None:
        config = AcceleratorState().deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = 4
        config["zero_allow_untested_optimizer"] = True
    if case == "values of another seed" and rank:
        model.load_state_dict(tiny_llava(5).state_dict())
    pre = apply_pre(model, weight=WEIGHT, seed=0 if case == "plain" else rank)
    heads = {name: device.type for name, device in devices(pre.heads[2])}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model.train(), optimizer)

    batch = collate(ranks.rows_of(rank, ranks.BOTH))
    pre.denominator = ranks.global_sum(pre.count(batch)) / ranks.RANKS
    labels = ranks.global_sum((batch["labels"][:, 1:] != -100).sum()) / ranks.RANKS
    loss = model(**batch, num_items_in_batch=labels).loss
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.backward(loss)  # without the step that `accelerator.backward` takes
        gradients = deepspeed_ranks.whole_gradients(model.module)
    else:
        accelerator.backward(loss)
        named = model.named_parameters()
        gradients = {
            n.removeprefix("module."): whole(p.grad) for n, p in named if p.grad is not None
        }
    kind = str(accelerator.distributed_type)
    torch.save((told, kind, heads, gradients, pre.metrics()), out / f"{case} {rank}.pt")
    accelerator.free_memory(model, optimizer)
    accelerator.end_training()


def on_rank(rank: int, case: str) -> AbstractContextManager[Any]:
    """Without weights on the ranks after the first, in a case of that name."""
    return init_empty_weights() if rank and case == "no values" else nullcontext()


def devices(head: Any) -> list[tuple[str, torch.device]]:
    return [(name, parameter.device) for name, parameter in head.named_parameters()]


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


def force_fsdp() -> None:
    """As Accelerate does on accelerators, by what its launcher made of the file's settings.

    On CPUs it stays with plain DDP: `AcceleratorState` takes FSDP up for MULTI_GPU and its like.
    """
    AcceleratorState().distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
