# SPDX-License-Identifier: Apache-2.0
"""Trainers whose ranks share sequences, two by two; the tests read the gradients that they leave.

transformers' Trainer runs its own code for accelerate's context and sequence parallelism, on an
accelerator of which a stand-in says that they are on, as the real one refuses them on CPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AttentionInterface, Trainer

from prereg_kernels import PReTrainer, PReTrainerMixin, SequenceParallel, apply_pre
from tests.releases import HERE
from tests.tiny import IMAGE_TOKEN, gradients, tiny_llava
from tests.trainers import processes
from tests.trainers.rows import WEIGHT, Row, collate, make_rows, make_trainer, step_gradients
from tests.trainers.sequence_ranks import Splitting, positions

RANKS, SIZE = 4, 2
LENGTH = 12
Part = dict[str, Tensor]


def rows_of_all() -> list[Row]:
    """Eight, of one length; an image is in the first half of the even ones, else in the second."""
    rows = []
    for number, row in enumerate(make_rows((1,) * 8, (5,) * 8)):
        if number % 2:
            row = row | {name: row[name].roll(8) for name in ("input_ids",)}
            row["labels"] = row["input_ids"].masked_fill(row["input_ids"] == IMAGE_TOKEN, -100)
            row["labels"][0] = -100  # which nothing predicts, and older Trainers count
        rows.append(row)
    return rows


def of_replica(rank: int) -> list[Row]:
    """Those that a pair of ranks shares, of which there are two."""
    return [row for number, row in enumerate(rows_of_all()) if number // 2 % 2 == rank // SIZE]


class Attention:
    """That of a decoder whose sequences the ranks of a group share, for one batch after another."""

    def __init__(self, model: Any, group: Any, cuts: bool) -> None:
        self._group, self._cuts, self._now = group, cuts, None
        AttentionInterface.register(
            "split", lambda *args, **kwargs: self._now.attend(*args, **kwargs)
        )
        model.config._attn_implementation = "sdpa"  # which alone Trainer allows with "cp"
        decoder = model.get_decoder()
        decoder.config._attn_implementation = "split"
        decoder.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rows, length = kwargs["inputs_embeds"].shape[:2]
        length = length if self._cuts else length * SIZE
        self._now = self.numbers = Splitting(
            self._group,
            positions("contiguous", self._group, rows, length),
            torch.ones(rows, length, dtype=torch.bool),
        )
        if self._cuts:
            return self._now.before_decoder(module, args, kwargs)
        return args, kwargs


def whole_rows(rank: int, out: Path, groups: list[Any]) -> Any:
    """As ms-swift: the model gets whole rows, its decoder is cut, and the loss is of the part."""
    group = groups[rank // SIZE]
    model = tiny_llava()
    attention = Attention(model, group, cuts=True)
    pre = apply_pre(model, weight=WEIGHT)
    pre.sequence_parallel = SequenceParallel(group, "contiguous")

    class Shared(PReTrainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(of_replica(rank), batch_size=2, collate_fn=collate)

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        labels = attention.numbers.cut(F.pad(labels[:, 1:], (0, 1), value=-100))
        sums = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return sums / num_items_in_batch * SIZE  # it is counted on each rank

    (step,) = step_gradients(
        model, out, 2, 2, cls=Shared, compute_loss_func=loss, rows=rows_of_all(), max_steps=1,
        ddp_find_unused_parameters=True,
    )  # fmt: skip
    return step, pre.metrics()


class OwnImages(Trainer):
    """Gives the model the images of the part of the rows that the ids are cut to."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        has_image = (inputs["input_ids"] == IMAGE_TOKEN).any(dim=1)
        inputs["pixel_values"] = inputs["pixel_values"][has_image]
        return super().compute_loss(model, inputs, *args, **kwargs)


class PReOwnImages(PReTrainerMixin, OwnImages):
    pass


def accelerator(group: Any, kind: str) -> Any:
    """As accelerate's, of what Trainer asks while it takes a step."""

    def summed(x: Tensor, reduction: str) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @contextmanager
    def cut(buffers: list[Tensor], buffer_seq_dims: Any, no_restore_buffers: Any) -> Iterator[None]:
        for buffer in buffers:  # in place, as torch's context_parallel does
            part = buffer.chunk(SIZE, dim=1)[dist.get_rank(group)].clone()
            buffer.resize_(part.shape)
            buffer.copy_(part)
        yield

    parallelism = SimpleNamespace(
        tp_size=1, cp_size=1, sp_size=1, cp_enabled=kind == "cp", sp_enabled=kind == "sp",
        cp_backend="torch", sp_backend="deepspeed" if kind == "sp" else None,
        non_data_parallel_size=SIZE,
    )  # fmt: skip
    setattr(parallelism, f"{kind}_size", SIZE)
    return SimpleNamespace(
        num_processes=RANKS, parallelism_config=parallelism, distributed_type="MULTI_CPU",
        reduce=summed, gather=partial(summed, reduction="sum"),
        torch_device_mesh={kind: SimpleNamespace(get_group=lambda: group)},
        maybe_context_parallel=cut, backward=lambda loss, **options: loss.backward(),
    )  # fmt: skip


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, x: Tensor) -> tuple[Tensor, ...]:
        ctx.group, parts = group, [torch.empty_like(x) for _ in range(SIZE)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        total = torch.stack(gradients)
        dist.all_reduce(total, group=ctx.group)
        return None, total[dist.get_rank(ctx.group)]


def all_gather(x: Tensor, group: Any) -> tuple[Tensor, ...]:
    """As torch.distributed.nn's, whose backward (2.13) on gloo takes a group's ranks for global."""
    return _AllGather.apply(group, x)


def have_deepspeed(group: Any) -> None:
    """Whatever asks for its groups gets this one."""
    groups = ModuleType("deepspeed.utils.groups")
    groups.__dict__["_get_sequence_parallel_group"] = lambda: group
    utils = ModuleType("deepspeed.utils")
    utils.__dict__["groups"] = groups
    sys.modules |= {"deepspeed": ModuleType("deepspeed"), utils.__name__: utils}
    sys.modules[groups.__name__] = groups
    torch.distributed.nn.functional.all_gather = all_gather


def own_rows(rank: int, out: Path, groups: list[Any], kind: str) -> Any:
    """As accelerate: context parallelism cuts whole batches, Ulysses' loader gives out parts."""
    group = groups[rank // SIZE]
    model = tiny_llava()
    Attention(model, group, cuts=False)
    pre = apply_pre(model, weight=WEIGHT)
    trainer = make_trainer(
        model, out, PReOwnImages, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer.accelerator = accelerator(group, kind)
    trainer.current_gradient_accumulation_steps = 2
    rows = of_replica(rank)
    batches = [collate(rows[start : start + 2]) for start in (0, 2)]
    for batch in batches:
        del batch["attention_mask"]
        if kind == "sp":
            labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
            batch |= {"shift_labels": labels, "position_ids": torch.arange(LENGTH).expand(2, -1)}
            for name in ("input_ids", "shift_labels", "position_ids"):
                batch[name] = batch[name].chunk(SIZE, dim=1)[dist.get_rank(group)].contiguous()
    if kind == "sp":
        have_deepspeed(group)
    batches, items = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    for batch in batches:
        trainer.training_step(model, batch, items)
    found = gradients(model)
    for x in found.values():
        dist.all_reduce(x)
        x /= RANKS if kind == "cp" else RANKS // SIZE
    return found, pre.metrics()


CASES = {"whole": whole_rows, "cp": partial(own_rows, kind="cp")}
if HERE >= (5, 0):  # the first whose Trainer knows Ulysses
    CASES["sp"] = partial(own_rows, kind="sp")


def work(rank: int, port: int, out: Path) -> None:
    processes.enter(rank, port, RANKS)
    dist.init_process_group("gloo")
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for name, case in CASES.items():
        torch.save(case(rank, out / name, groups), out / f"{name} {rank}.pt")
    processes.leave()


def run(out: Path) -> None:
    """All of it."""
    processes.run(out, work, RANKS, start="forkserver")
