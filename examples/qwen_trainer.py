# SPDX-License-Identifier: Apache-2.0
"""PRe with Qwen2.5-VL: images of any size, each with as many visual tokens as it needs.

Trainer divides this model's loss by the number of micro-batches; PReTrainer's mean of L_PRe is that
over all visual tokens all the same.
"""

from __future__ import annotations

import tempfile

from tiny import make_samples
from tiny_qwen import QwenCollator, make_qwen
from transformers import TrainingArguments

from prereg_kernels import apply_pre  # PRe
from prereg_kernels.trainers import PReTrainer  # PRe


def main() -> None:
    model = make_qwen()
    apply_pre(model, anchor="pre_projector")  # PRe
    trainer = PReTrainer(
        model,
        TrainingArguments(
            tempfile.mkdtemp(), max_steps=20, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=5,
            remove_unused_columns=False, report_to=[], use_cpu=True, save_strategy="no",
        ),
        train_dataset=make_samples(64),
        data_collator=QwenCollator(),
    )  # fmt: skip
    trainer.train()
    values = [log["pre_loss"] for log in trainer.state.log_history if "pre_loss" in log]
    print(f"pre_loss {values[0]:.3f} -> {values[-1]:.3f}")


if __name__ == "__main__":
    main()
