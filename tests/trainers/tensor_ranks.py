# SPDX-License-Identifier: Apache-2.0
"""What ranks do that have the same hidden states; the tests read what they leave."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlavaForConditionalGeneration

from prereg_kernels import SequenceParallel, apply_pre, pre_tap
from tests.helpers import make_problem
from tests.tiny import gradients, make_batch, tiny_llava
from tests.trainers import processes

RANKS = 4
WEIGHT = 3.0
IMAGES = (2, 1)
WIDTHS = (16, 24, 20)
HEAD = 17

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers, one head": {"layers": (1, 3), "share_head": True},
    "whole images": {"level": "global"},
    "a fraction": {"token_fraction": 0.5},
    "value": {"value_in_forward": True},
    "encoder": {"anchor": "pre_projector"},
}  # fmt: skip


def steps(
    group: Any,
    *,
    checkpointing: bool | None = None,
    images: tuple[int, ...] = IMAGES,
    **settings: Any,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of two micro-batches, and the figures of the last, with a group or without."""
    model = tiny_llava().double()
    pre = apply_pre(model, weight=WEIGHT, **settings)
    if group is not None:
        pre.tensor_parallel_group = group
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    for seed in (0, 1):
        batch = make_batch(images, seed=seed)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].double()
        model(**batch).loss.backward()
    return gradients(model), pre.metrics()


CASES: dict[str, Any] = {name: partial(steps, **x) for name, x in SETTINGS.items()} | {
    "checkpointing": partial(steps, checkpointing=False),
    "reentrant": partial(steps, checkpointing=True),
    "reentrant, whole images": partial(steps, checkpointing=True, level="global"),
    "text": partial(steps, images=(0, 0)),
    "one token a rank": partial(steps, images=(1, 0)),
}


def loaded(path: Path, rank: int) -> Any:
    """Of a model that transformers has split: gradients, figures, and the heads after three steps
    of AdamW."""
    model = LlavaForConditionalGeneration.from_pretrained(
        path, tp_plan="auto", tp_size=RANKS, dtype=torch.float64
    ).train()
    pre = apply_pre(model, weight=WEIGHT)
    batch = make_batch(IMAGES)
    batch["pixel_values"] = batch["pixel_values"].double()
    model(**batch).loss.backward()
    found = {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    figures = pre.metrics()
    optimizer = torch.optim.AdamW(pre.heads[2].parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    is_found = pre.tensor_parallel_group is not None
    return is_found, found, figures, [p.detach().clone() for p in pre.heads[2].parameters()]


def flops(group: Any, tokens: int) -> int:
    """Of all products in the forward and backward pass of a tap, as torch's profiler counts."""
    problem = make_problem((2, tokens), WIDTHS, visual_mask=torch.rand(2, tokens) < 2)
    leaves = problem.leaves()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
        pre_tap(*problem.arguments(leaves), group=group)[1].backward()
    return sum(event.flops for event in seen.events() if event.flops and "mm" in event.name)


def flops_of_heads(group: Any, evaluates: bool = False, **settings: Any) -> int:
    """Of a step of a model, or a pass that evaluates: the products of matrices that are as wide as
    nothing but the head.
    """
    model = tiny_llava().train(not evaluates)
    pre = apply_pre(model, head_features=HEAD, value_in_eval=evaluates, **settings)
    pre.tensor_parallel_group = group
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as seen:
        loss = model(**make_batch(IMAGES)).loss
        if not evaluates:
            loss.backward()
    products = (event for event in seen.events() if event.flops and "mm" in event.name)
    return sum(x.flops for x in products if any(HEAD in shape for shape in x.input_shapes))


def evaluated(group: Any, **settings: Any) -> dict[str, float]:
    """The figures of a pass that evaluates."""
    model = tiny_llava().double().eval()
    pre = apply_pre(model, value_in_eval=True, **settings)
    pre.tensor_parallel_group = group
    batch = make_batch(IMAGES)
    model(**batch | {"pixel_values": batch["pixel_values"].double()})
    return pre.metrics()


def own_tokens(group: Any) -> Mapping[str, Tensor]:
    """The tap's gradients where each rank of a group has tokens of its own."""
    problem = make_problem((1, 8 * dist.get_world_size(group)), WIDTHS, dtype=torch.float64)
    leaves, rank = problem.leaves(), dist.get_rank(group)
    hidden, anchor, *others = problem.arguments(leaves)
    mine = slice(8 * rank, 8 * rank + 8)
    tapped, value = pre_tap(
        hidden[:, mine], anchor[:, mine], *others, group=group, same_hidden=False,
        denominator=hidden.shape[1],
    )  # fmt: skip
    (tapped.sum() + 2 * value).backward()
    return {name: x.grad for name, x in leaves.items() if x.grad is not None}


def sequence_region(group: Any) -> dict[str, float]:
    """The figures where ranks have parts of the sequences, and every one the LM loss of all."""
    model = tiny_llava().double()
    pre = apply_pre(model)
    pre.sequence_parallel = SequenceParallel(group, None, "none")
    batch = make_batch(IMAGES)
    model(**batch | {"pixel_values": batch["pixel_values"].double()}).loss.backward()
    return pre.metrics()


def work(rank: int, port: int, out: Path) -> None:
    processes.enter(rank, port, RANKS)
    dist.init_process_group("gloo")
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: halves[rank // 2], 4: dist.group.WORLD}
    found = {
        name: [case(None), *(case(group) for group in groups.values()), case(groups[4])]
        for name, case in CASES.items()
    }
    torch.save(found, out / f"cases {rank}.pt")
    torch.save(loaded(out / "model", rank), out / f"loaded {rank}.pt")
    counts = [flops(group, 40) for group in (None, *groups.values())]
    uneven = [flops(group, 5) for group in (None, *groups.values())]
    heads = [flops_of_heads(group) for group in groups.values()]
    images = [flops_of_heads(group, level="global") for group in groups.values()]
    values = [flops_of_heads(group, evaluates=True) for group in groups.values()]
    torch.save((counts, uneven, heads, images, values), out / f"flops {rank}.pt")
    levels = ({}, {"level": "global"})
    figures = [[evaluated(x, **level) for x in (None, *groups.values())] for level in levels]
    torch.save(figures, out / f"evaluated {rank}.pt")
    torch.save(own_tokens(groups[4]), out / f"own {rank}.pt")
    torch.save(sequence_region(groups[4]), out / f"region {rank}.pt")
    processes.leave()


def run(out: Path) -> None:
    """All of it."""
    processes.run(out, work, RANKS, start="forkserver")
