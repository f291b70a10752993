# SPDX-License-Identifier: Apache-2.0
"""PReTrainerMixin over TRL's SFTTrainer, which computes its own loss from its own outputs.

`make test-trl` runs this file by its name, with TRL on the path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import trl
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.trainers import PReTrainerMixin, with_pre
from tests.attached import compare
from tests.tiny import tiny_llava
from tests.trainers.rows import WEIGHT, Gradients, collate, eager_gradients, make_rows


class PReSFTTrainer(PReTrainerMixin, trl.SFTTrainer):
    """SFTTrainer with PRe."""


def pick(numbers: Sequence[dict[str, int]]) -> dict[str, Tensor]:
    """The batch of the rows of these numbers."""
    rows = make_rows()
    return collate([rows[entry["number"]] for entry in numbers])


def make_sft(model: Any, out: Path, cls: Any = PReSFTTrainer, **arguments: Any) -> Any:
    """On the rows, in order, in two micro-batches of four."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(i): i for i in range(40)}, "0"))
    callbacks = arguments.pop("callbacks", None)
    adapter = arguments.pop("peft_config", None)
    defaults: dict[str, Any] = {
        "output_dir": str(out), "use_cpu": True, "bf16": False, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "num_train_epochs": 1,
        "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "max_length": None,
        "dataloader_pin_memory": False, "remove_unused_columns": False,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "dataset_kwargs": {"skip_prepare_dataset": True}, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return cls(
        model,
        trl.SFTConfig(**(defaults | arguments)),
        data_collator=pick,
        train_dataset=datasets.Dataset.from_dict({"number": list(range(8))}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="0", eos_token="1"
        ),
        callbacks=callbacks,
        peft_config=adapter,
    )


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
@pytest.mark.parametrize("accepts_loss_kwargs", (False, True))
def test_gradients_of_a_step(
    tmp_path: Path, label_smoothing: float, accepts_loss_kwargs: bool
) -> None:
    model = tiny_llava()
    model.accepts_loss_kwargs = accepts_loss_kwargs
    pre = apply_pre(model, weight=WEIGHT)
    keeper = Gradients()
    trainer = make_sft(
        model, tmp_path, learning_rate=0.0, optim="sgd", callbacks=[keeper],
        label_smoothing_factor=label_smoothing,
    )  # fmt: skip
    trainer.train()
    (ours,) = keeper.steps
    remove_pre(model)
    rows = make_rows()
    groups = None if accepts_loss_kwargs else [rows[:4], rows[4:]]
    expected = eager_gradients(pre.heads, rows, groups=groups)
    if label_smoothing:  # then L_LM is another; the heads have no part in it
        expected = {name: expected[name] for name in expected if "pre_heads" in name}
        for name, x in expected.items():
            assert torch.linalg.norm(ours[name] - x) < 1e-5 * x.norm()
    else:
        compare(ours, expected)
    log = trainer.state.log_history[0]
    assert log["lm_loss"] == pytest.approx(log["loss"])
    assert log["pre_loss"] != 0 and "mean_token_accuracy" in log


def test_resumed_training_is_uninterrupted_training(tmp_path: Path) -> None:
    states = []
    for seed, checkpoint in ((0, None), (5, str(tmp_path / "checkpoint-2"))):
        model = tiny_llava(seed)
        apply_pre(model, seed=seed)
        trainer = make_sft(
            model, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append({name: x.clone() for name, x in model.state_dict().items()})
    assert all(torch.equal(states[1][name], x) for name, x in states[0].items())


def test_lora(tmp_path: Path) -> None:
    """PEFT freezes the heads; thawed, they train, are saved beside the adapter, and come back."""
    states = []
    for seed, checkpoint in ((0, None), (5, str(tmp_path / "checkpoint-2"))):
        model = tiny_llava()
        pre = apply_pre(model, seed=seed)
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        lora = peft.get_peft_model(model, config)
        for head in pre.heads.values():
            head.requires_grad_(True)
        trainer = make_sft(
            lora, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2
        )
        before = pre.heads[2].weight_0.clone()
        trainer.train(resume_from_checkpoint=checkpoint)
        assert not torch.equal(pre.heads[2].weight_0, before)
        states.append({name: x.clone() for name, x in lora.state_dict().items()})
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files and "pre" in files
    assert all(torch.equal(states[1][name], x) for name, x in states[0].items())


def test_lora_with_frozen_heads(tmp_path: Path) -> None:
    model = tiny_llava()
    pre = apply_pre(model)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for head in pre.heads.values():
        head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"pre\.heads: expected heads that train"):
        make_sft(lora, tmp_path).train()


@pytest.mark.parametrize("named", (False, True))
@pytest.mark.parametrize("adapted", (False, True))
def test_with_pre(tmp_path: Path, named: bool, adapted: bool) -> None:
    """A model or its path, whole or by `peft_config=`: heads move by the rate and the gradient."""
    model: Any = tiny_llava()
    if named:
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj")
    keeper = Gradients()
    trainer = make_sft(
        model, tmp_path, with_pre(trl.SFTTrainer, weight=WEIGHT), learning_rate=0.1, optim="sgd",
        callbacks=[keeper], peft_config=config if adapted else None, save_strategy="steps",
        save_steps=1, model_init_kwargs={"dtype": "float32"} if named else None,
    )  # fmt: skip
    heads = trainer.pre.heads[2]
    before = {name: p.detach().clone() for name, p in heads.named_parameters()}
    trainer.train()
    (grads,) = ({n.split("pre_heads.2.")[-1]: x for n, x in step.items()} for step in keeper.steps)
    for name, x in before.items():
        torch.testing.assert_close(heads.get_parameter(name), x - 0.1 * grads[name])
        heads.get_parameter(name).data.copy_(x)
    expected = eager_gradients(trainer.pre.heads, make_rows())
    for name in before:  # LoRA begins with zeros, so the states are those of the model
        x = expected[f"pre_heads.2.{name}"]
        assert torch.linalg.norm(grads[name] - x) < 1e-5 * x.norm()
    assert (tmp_path / "checkpoint-1" / "pre" / "pre_heads.safetensors").is_file()
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file() == adapted
    assert "pre_loss" in trainer.state.log_history[0]
