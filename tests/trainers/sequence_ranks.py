# SPDX-License-Identifier: Apache-2.0
"""What ranks do that share the sequences of a batch; the tests read the gradients that they leave.

The attention of the tiny LLaVA reaches over the ranks of a group, and a hook on its decoder cuts
what enters it, as ms-swift's does: embeddings with features in them, after the vision tower.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from prereg_kernels import SequenceParallel, apply_pre
from tests.attach.families.models import pooled
from tests.attached import anchor_of_pixels
from tests.tiny import IMAGE_TOKEN, gradients, make_batch, tiny_llava
from tests.trainers import processes

RANKS = 4
OF_FOUR = ("contiguous", "zigzag", "a function", "whole images", "encoder, whole images")
WEIGHT = 3.0
LENGTH = 13  # of which no part is a multiple, so that ranks pad; images are cut


def batch_of_all() -> dict[str, Any]:
    """Two images in one row, one in the other."""
    batch = make_batch((2, 1), LENGTH)
    batch["attention_mask"][1, -2:] = 0
    batch["labels"][1, -2:] = -100
    return batch | {"pixel_values": batch["pixel_values"].double()}


class _Gather(torch.autograd.Function):
    """(..., own length, D) of each rank of a group, one after another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.length = group, x.shape[-2]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.length
        return gradient[..., start : start + ctx.length, :], None


class Splitting:
    """Cuts the decoder's sequences, and lets its attention see all of them.

    Attributes:
        numbers: (rows, own length), of the positions of this rank; -1 where it pads.
    """

    def __init__(self, group: Any, numbers: Tensor, visible: Tensor) -> None:
        self.group, self.numbers = group, numbers
        keys = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
        dist.all_gather(keys, numbers.contiguous(), group=group)
        self.keys = torch.cat(keys, dim=1)
        self.is_key = (self.keys >= 0) & visible.gather(1, self.keys.clamp(min=0)).bool()

    def cut(self, whole: Tensor) -> Tensor:
        """(rows, own length, ...)"""
        rows = torch.arange(len(whole))[:, None]
        return whole[rows, self.numbers.clamp(min=0)]

    def before_decoder(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["inputs_embeds"] = self.cut(kwargs["inputs_embeds"])
        kwargs["position_ids"] = self.numbers.clamp(min=0)
        kwargs["attention_mask"] = None
        return args, kwargs

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        k, v = (_Gather.apply(x, self.group) for x in (k, v))
        own, keys = self.numbers[:, :, None], self.keys[:, None, :]
        allowed = (keys <= own) & self.is_key[:, None, :] | (own < 0)
        scores = q @ k.transpose(2, 3) * module.scaling
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2), None


def positions(shard: str, group: Any, rows: int, length: int) -> Tensor:
    """Which each rank has, padded with -1; "tail" pads in front, which a function has to say."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    pieces = 2 * size if shard == "zigzag" else size
    missing = -length % pieces
    whole = torch.arange(length).expand(rows, length)
    whole = F.pad(whole, (missing, 0) if shard == "front" else (0, missing), value=-1)
    parts = whole.chunk(pieces, dim=1)
    if shard == "zigzag":
        return torch.cat([parts[rank], parts[2 * size - 1 - rank]], dim=1)
    return parts[rank].contiguous()


def front(group: Any, numbers: Tensor) -> Tensor:
    """What a function of the user's does to the positions: equal parts, after padding in front."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    return F.pad(numbers, (-numbers.shape[1] % size, 0)).chunk(size, dim=1)[rank]


def split_gradients(
    group: Any,
    *,
    shard: str = "contiguous",
    cut_before: bool = False,
    own_calls: bool = False,
    checkpointing: bool | None = None,
    reduce: str = "averaged",
    counted: bool = False,
    **settings: Any,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Of a step whose sequences the ranks of a group share, and its figures.

    Args:
        cut_before: the hook that cuts comes before PRe's, which sees parts then.
        own_calls: the model is called with this rank's embeddings, and a mask of them.
        checkpointing: None, or whether it is reentrant. reduce: `SequenceParallel.gradients`.
        counted: with `pre.denominator` of the step.
    """
    model, batch = tiny_llava().double(), batch_of_all()
    numbers = positions(shard, group, *batch["input_ids"].shape)
    splitting = Splitting(group, numbers, batch["attention_mask"])
    AttentionInterface.register("split", splitting.attend)
    model.model.language_model.config._attn_implementation = "split"
    cut = partial(
        model.get_decoder().register_forward_pre_hook, splitting.before_decoder, with_kwargs=True
    )
    if cut_before:
        cut()
    pre = apply_pre(model, weight=WEIGHT, **settings)
    if not cut_before and not own_calls:
        cut()
    known = partial(front, group) if shard == "front" else shard
    pre.sequence_parallel = SequenceParallel(group, None if own_calls else known, reduce)
    size = dist.get_world_size(group)
    if counted:
        pre.denominator = pre.count(batch) / (size if reduce == "averaged" else 1)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    if own_calls:
        ids = batch["input_ids"]
        whole = model.get_input_embeddings()(ids)
        features = pooled(model.model.get_image_features(batch["pixel_values"]))
        mask = ids == IMAGE_TOKEN
        whole = whole.masked_scatter(mask[..., None], torch.cat(features))
        pre.next_visual_mask = splitting.cut(mask) & (numbers >= 0)
        batch = {"inputs_embeds": splitting.cut(whole), "position_ids": numbers.clamp(min=0)}
    logits = model(**batch).logits
    own = splitting.cut(labels).masked_fill(numbers < 0, -100)
    lm = F.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="sum")
    lm = lm / (labels != -100).sum()
    scale = size if reduce == "averaged" else 1
    (lm * scale + pre.loss).backward()
    found = gradients(model)
    for name, x in found.items():
        if reduce == "none" and "pre_heads" in name:  # they have been summed
            continue
        dist.all_reduce(x, group=group)
        x /= scale
    return found, pre.metrics()


CASES: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "hook before": {"cut_before": True, "counted": True},
    "zigzag": {"shard": "zigzag", "layers": (1, 3)},
    "a function": {"shard": "front"},
    "own calls": {"own_calls": True},
    "summed": {"reduce": "summed"},
    "by PRe": {"reduce": "none", "counted": True},
    "checkpointing": {"checkpointing": False},
    "reentrant": {"checkpointing": True},
    "whole images": {"level": "global", "layers": (1, 3)},
    "whole images, hook before, zigzag": {
        "level": "global", "cut_before": True, "shard": "zigzag", "checkpointing": False,
    },
    "whole images, reentrant": {"level": "global", "checkpointing": True, "counted": True},
    "encoder": {"anchor": "pre_projector", "shard": "zigzag"},
    "encoder, whole images": {"anchor": "pre_projector", "level": "global"},
    "function": {"anchor": anchor_of_pixels, "anchor_features": 8, "shard": "zigzag"},
}  # fmt: skip


def work(rank: int, port: int, out: Path) -> None:
    processes.enter(rank, port, RANKS)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for size, group in ((2, halves[rank // 2]), (4, dist.group.WORLD)):
        for name, case in CASES.items():
            if size == 4 and name not in OF_FOUR:
                continue
            torch.save(split_gradients(group, **case), out / f"{name} {size} {rank}.pt")
    processes.leave()


def run(out: Path) -> None:
    """All cases."""
    processes.run(out, work, RANKS, start="forkserver")
