# SPDX-License-Identifier: Apache-2.0
"""Rows of uneven lengths, answers and image counts; a trainer on them, and its steps' gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from prereg_kernels import PReHead
from prereg_kernels.trainers import PReTrainer
from tests.attached import eager_term
from tests.releases import HERE
from tests.tiny import IMAGE_TOKEN, PATCHES, gradients, tiny_llava

Row = dict[str, Tensor]
IMAGES = (1, 2, 0, 0, 2, 0, 0, 0)  # on two ranks, in batches of two, one has none
WEIGHT = 3.0  # large enough for a wrong denominator to show in every gradient


def make_rows(
    images: Sequence[int] = IMAGES, answers: Sequence[int] | None = None, seed: int = 0
) -> list[Row]:
    """A row per entry of `images`, with so many images, and `answers`, with so many labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, count in enumerate(images):
        visual, answer = count * PATCHES, answers[number] if answers else 2 + 3 * number % 7
        length = visual + 3 + answer
        input_ids = torch.randint(1, 30, (length,), generator=generator)
        input_ids[:visual] = IMAGE_TOKEN
        labels = input_ids.clone()
        labels[: length - answer] = -100
        pixels = torch.randn(count, 3, 16, 16, generator=generator)
        rows.append({"input_ids": input_ids, "labels": labels, "pixel_values": pixels})
    return rows


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded on the right."""

    def pad(name: str, value: int) -> Tensor:
        columns = [row[name] for row in rows]
        return nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    pixels = torch.cat([row["pixel_values"] for row in rows])
    return batch | ({"pixel_values": pixels} if len(pixels) else {})


class Gradients(TrainerCallback):
    """Keeps the gradients of each step, before the optimizer uses them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.steps.append(gradients(model))


class InOrder(Trainer):
    """A trainer that goes through its rows in order."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def make_trainer(
    model: nn.Module | None,
    out: Path,
    cls: type[Trainer] = PReTrainer,
    rows: Sequence[Row] | None = None,
    **arguments: Any,
) -> Trainer:
    """A trainer on the CPU that goes through the rows in order; `arguments`: of either class."""
    own = ("compute_loss_func", "callbacks", "eval_dataset", "model_init", "optimizers")
    others = {name: arguments.pop(name) for name in own if name in arguments}
    defaults: dict[str, Any] = {
        "output_dir": str(out), "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "num_train_epochs": 1, "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "remove_unused_columns": False,
    }  # fmt: skip
    arguments = defaults | arguments
    if HERE < (5, 16):  # which has no such argument
        arguments.pop("train_sampling_strategy")  # nor do all of these resume a random order
        cls = type(cls.__name__, (InOrder, cls), {})
    return cls(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=list(make_rows() if rows is None else rows),
        data_collator=collate,
        **others,
    )


def step_gradients(
    model: nn.Module, out: Path, micro_batch: int, micro_batches: int, **arguments: Any
) -> list[dict[str, Tensor]]:
    """The gradients of the steps of an epoch, all at the model's initial weights."""
    keeper = Gradients()
    make_trainer(
        model, out, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=micro_batches, callbacks=[keeper], learning_rate=0.0,
        optim="sgd", **arguments,
    ).train()  # fmt: skip
    return keeper.steps


def eager_gradients(
    heads: Mapping[int, PReHead],
    rows: Sequence[Row],
    *,
    groups: Sequence[Sequence[Row]] | None = None,
    weight: float = WEIGHT,
    level: str = "patch",
) -> dict[str, Tensor]:
    """The gradients of L_LM + weight * L_PRe of one step, by the definitions.

    L_PRe is the mean over all visual tokens of `rows`, or over their images; L_LM the mean over all
    of their labels, or the mean over `groups` of each one's mean.
    """
    model = tiny_llava()
    count, images = sum(int((row["input_ids"] == IMAGE_TOKEN).sum()) for row in rows), None
    if level == "global":
        count //= PATCHES
        images = [PATCHES] * count
    _, term = eager_term(model, collate(rows), heads, denominator=max(count, 1), images=images)
    means = [eager_term(model, collate(group), heads)[0] for group in groups or [rows]]
    for head in heads.values():
        head.zero_grad()
    (torch.stack(means).mean() + weight * term).backward()
    expected = gradients(model)
    for layer, head in heads.items():
        expected |= {f"pre_heads.{layer}.{name}": p.grad for name, p in head.named_parameters()}
    return expected
