# SPDX-License-Identifier: Apache-2.0
"""PRe in a loop with Accelerate: gradient accumulation and ranks, exactly.

On several GPUs: `accelerate launch accelerate_loop.py`, without `cpu=True`.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from tiny import Collator, make_model, make_processor, make_samples
from torch.utils.data import DataLoader

from prereg_kernels import apply_pre  # PRe

ACCUMULATE = 2


def main() -> None:
    # LLaVA does not use all of its tower, whose features come from the last layer but one
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[unused])
    model = make_model().train()
    pre = apply_pre(model, anchor="pre_projector")  # PRe: before `prepare` and the optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    collate = Collator(make_processor())
    loader = DataLoader(make_samples(64), batch_size=4, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    values: list[float] = []
    for _ in range(3):
        batches = iter(loader)
        while step := list(islice(batches, ACCUMULATE)):
            # What a rank's sums are divided by, over the micro-batches; the ranks are averaged.
            rows = sum(pre.count(batch) for batch in step)
            labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
            pre.denominator = accelerator.reduce(rows.float(), "mean")  # PRe
            labels = accelerator.reduce(labels.float(), "mean")
            for number, batch in enumerate(step, 1):
                last = number == len(step)
                with nullcontext() if last else accelerator.no_sync(model):
                    accelerator.backward(model(**batch, num_items_in_batch=labels).loss)
            optimizer.step()
            optimizer.zero_grad()
            values.append(pre.metrics()["pre_loss"])  # of the last micro-batch, of all ranks
    accelerator.print(f"pre_loss {values[0]:.3f} -> {values[-1]:.3f}")
    # DDP goes before its process group: torch's gloo backend aborts or hangs where it goes after
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main()
