# SPDX-License-Identifier: Apache-2.0
"""PRe with LoRA: PEFT trains an adapter, and PRe's head beside it.

PEFT freezes all that it did not make. PRe that comes afterwards is left alone; a head that is
frozen is an error in the first training step.
"""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, get_peft_model
from tiny import Collator, make_folder, make_model, make_processor, make_samples
from transformers import TrainingArguments

from prereg_kernels import apply_pre, remove_pre  # PRe
from prereg_kernels.trainers import PReTrainer  # PRe


def main() -> None:
    config = LoraConfig(
        r=8,
        target_modules=r".*language_model.*(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],  # with PRe the projector has to train, too
    )
    model = get_peft_model(make_model(), config)
    apply_pre(model, anchor="pre_projector")  # PRe: to the LLaVA inside

    out = make_folder()
    trainer = PReTrainer(
        model,
        TrainingArguments(
            out, max_steps=40, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=3e-3, logging_steps=5, save_steps=40, remove_unused_columns=False,
            report_to=[], use_cpu=True,
        ),
        train_dataset=make_samples(64),
        data_collator=Collator(make_processor()),
    )  # fmt: skip
    trainer.train()
    values = [log["pre_loss"] for log in trainer.state.log_history if "pre_loss" in log]
    print("a checkpoint:", sorted(path.name for path in Path(out, "checkpoint-40").iterdir()))

    merged = model.merge_and_unload()
    remove_pre(merged)
    merged.save_pretrained(f"{out}/merged")  # a plain LLaVA
    print(f"pre_loss {values[0]:.3f} -> {values[-1]:.3f}")


if __name__ == "__main__":
    main()
