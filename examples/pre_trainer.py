# SPDX-License-Identifier: Apache-2.0
"""PRe with PReTrainer: exact over micro-batches and ranks, in the logs, in the checkpoints.

On several GPUs: `torchrun --nproc-per-node 8 pre_trainer.py`, without `use_cpu`.
"""

from __future__ import annotations

from pathlib import Path

from tiny import Collator, make_folder, make_model, make_processor, make_samples
from transformers import TrainingArguments

from prereg_kernels import apply_pre  # PRe
from prereg_kernels.trainers import PReTrainer  # PRe


def make_trainer(out: str) -> PReTrainer:
    """A trainer of a new model."""
    model, processor = make_model(), make_processor()
    apply_pre(model, anchor="pre_projector")  # PRe
    return PReTrainer(
        model,
        TrainingArguments(
            out, max_steps=20, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=3e-3, logging_steps=5, save_steps=10, remove_unused_columns=False,
            report_to=[], use_cpu=True,
        ),
        train_dataset=make_samples(64),
        data_collator=Collator(processor),
    )  # fmt: skip


def main() -> None:
    out = make_folder()
    trainer = make_trainer(out)
    trainer.train()
    print_once = trainer.accelerator.print  # on one rank
    print_once("a checkpoint:", sorted(path.name for path in Path(out, "checkpoint-10").iterdir()))
    values = [log["pre_loss"] for log in trainer.state.log_history if "pre_loss" in log]

    resumed = make_trainer(out)  # as if the run had stopped at step 10
    resumed.train(resume_from_checkpoint=f"{out}/checkpoint-10")
    again = [log["pre_loss"] for log in resumed.state.log_history if "pre_loss" in log]
    print_once("resumed, the same:", values == again)
    print_once(f"pre_loss {values[0]:.3f} -> {values[-1]:.3f}")


if __name__ == "__main__":
    main()
