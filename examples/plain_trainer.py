# SPDX-License-Identifier: Apache-2.0
"""PRe with transformers' own Trainer: one line more than without.

The term's share in each micro-batch goes by labels, and checkpoints have no heads; PReTrainer
(pre_trainer.py) does both exactly.
"""

from __future__ import annotations

import tempfile
from typing import Any

from tiny import Collator, make_model, make_processor, make_samples
from transformers import Trainer, TrainerCallback, TrainingArguments

from prereg_kernels import PRe, apply_pre  # PRe


class Figures(TrainerCallback):
    """Puts PRe's figures of the last micro-batch beside the others of each log."""

    def __init__(self, pre: PRe) -> None:
        self.pre, self.values = pre, []

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            logs["pre_loss"] = self.pre.metrics()["pre_loss"]
            self.values.append(logs["pre_loss"])


def main() -> None:
    model, processor = make_model(), make_processor()
    pre = apply_pre(model, anchor="pre_projector")  # PRe: before the trainer

    figures = Figures(pre)
    trainer = Trainer(
        model,
        TrainingArguments(
            tempfile.mkdtemp(), max_steps=20, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=5,
            logging_first_step=True, remove_unused_columns=False, report_to=[], use_cpu=True,
            save_strategy="no",
        ),
        train_dataset=make_samples(64),
        data_collator=Collator(processor),
        callbacks=[figures],
    )  # fmt: skip
    trainer.train()
    print(f"pre_loss {figures.values[0]:.3f} -> {figures.values[-1]:.3f}")


if __name__ == "__main__":
    main()
