# SPDX-License-Identifier: Apache-2.0
"""PRe with TRL's SFTTrainer, by `with_pre`.

It is needed there: SFTTrainer computes its own loss, so that `apply_pre` alone would train nothing.
"""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from tiny import make_model, make_processor, make_samples
from trl import SFTConfig, SFTTrainer

from prereg_kernels.trainers import with_pre  # PRe

PReSFTTrainer = with_pre(SFTTrainer, anchor="pre_projector")  # PRe


def conversation(sample: dict[str, Any]) -> dict[str, Any]:
    """TRL's prompt-completion form; its collator puts the images before the text."""
    prompt = [{"role": "user", "content": "which colours"}]
    completion = [{"role": "assistant", "content": sample["answer"]}]
    return {"images": sample["images"], "prompt": prompt, "completion": completion}


def main() -> None:
    model, processor = make_model(), make_processor()
    trainer = PReSFTTrainer(
        model,
        SFTConfig(
            tempfile.mkdtemp(), max_steps=20, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=5, max_length=None,
            report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        ),
        train_dataset=Dataset.from_list([conversation(sample) for sample in make_samples(64)]),
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    values = [log["pre_loss"] for log in trainer.state.log_history if "pre_loss" in log]
    print(f"pre_loss {values[0]:.3f} -> {values[-1]:.3f}")


if __name__ == "__main__":
    main()
