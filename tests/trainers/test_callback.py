# SPDX-License-Identifier: Apache-2.0
"""PReCallback: PRe in a Trainer that somebody else makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from prereg_kernels import apply_pre, find_pre
from prereg_kernels.trainers import PReCallback, PReTrainer
from tests.attached import compare
from tests.tiny import tiny_llava
from tests.trainers.rows import WEIGHT, Gradients, eager_gradients, make_rows, make_trainer
from tests.trainers.test_checkpoints import warnings_of

LORA = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)


def with_lora(seed: int = 0) -> Any:
    model = tiny_llava()
    torch.manual_seed(seed)
    return peft.get_peft_model(model, LORA)


def saving(model: Any, out: Path, callback: PReCallback, **arguments: Any) -> Any:
    """A plain Trainer that saves at steps 2 and 4."""
    defaults = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    return make_trainer(
        model, out, arguments.pop("cls", Trainer), callbacks=[callback],
        per_device_train_batch_size=2, **(defaults | arguments),
    )  # fmt: skip


def heads_of(pre: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pre.heads[2].named_parameters()}


def test_a_step_moves_the_heads_by_rate_and_gradient(tmp_path: Path) -> None:
    """Of a full micro-batch, whose gradients are the definition's."""
    callback, keeper = PReCallback(weight=WEIGHT), Gradients()
    trainer = make_trainer(
        tiny_llava(), tmp_path, Trainer, callbacks=[callback, keeper], optim="sgd",
        learning_rate=0.1, per_device_train_batch_size=8,
    )  # fmt: skip
    assert callback.pre is find_pre(trainer.model)
    before = heads_of(callback.pre)
    trainer.train()
    for name, x in heads_of(callback.pre).items():
        grad = keeper.steps[0][f"pre_heads.2.{name}"]
        assert grad.norm() > 1e-3
        torch.testing.assert_close(x, before[name] - 0.1 * grad)
    for name, x in before.items():
        getattr(callback.pre.heads[2], name).data.copy_(x)
    compare(keeper.steps[0], eager_gradients(callback.pre.heads, make_rows()))


def test_figures_reach_the_history_and_later_callbacks(tmp_path: Path) -> None:
    seen: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}

    class See(TrainerCallback):
        def __init__(self, where: str) -> None:
            self.where = where

        def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
            seen[self.where].append(dict(logs))

    class After(See):
        pass

    callback, figures = PReCallback(), []

    class Read(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            figures.append(callback.pre.metrics())

    trainer = make_trainer(
        tiny_llava(), tmp_path, Trainer, callbacks=[See("before"), callback, After("after"), Read()]
    )
    trainer.train()
    history = [log for log in trainer.state.log_history if "loss" in log]
    assert len(history) == len(figures) == 1 and history[0]["pre_loss"] == figures[0]["pre_loss"]
    assert history[0]["lm_loss"] == figures[0]["lm_loss"] != 0
    assert seen["after"][0]["pre_loss"] == figures[0]["pre_loss"]
    assert "pre_loss" not in seen["before"][0] and "visual_tokens" not in history[0]
    assert not any("pre_loss" in log for log in trainer.state.log_history[1:])


@pytest.mark.parametrize("named", (False, True))
def test_resumed_lora_is_uninterrupted_lora(tmp_path: Path, named: bool) -> None:
    """Its checkpoints have the heads beside the adapter; elsewhere than in the output, by name."""
    states = []
    for seed, checkpoint in ((0, None), (5, str(tmp_path / "first" / "checkpoint-2"))):
        again = checkpoint is not None and named
        out = tmp_path / ("second" if again else "first")
        own = {"resume_from_checkpoint": checkpoint} if again else {}
        callback = PReCallback(token_fraction=0.5)
        trainer = saving(with_lora(seed), out, callback, **own)
        for p in callback.pre.heads[2].parameters():
            p.data.add_(seed)
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append({name: x.clone() for name, x in trainer.model.state_dict().items()})
        assert callback.pre.passes == 4
        assert (out / "checkpoint-4" / "pre" / "pre_heads.safetensors").is_file()
    assert all(torch.equal(states[1][name], x) for name, x in states[0].items())


def test_a_full_model_writes_them_once_and_gets_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, written = PReCallback(), []
    trainer = saving(tiny_llava(), tmp_path, first)
    save = type(first.pre).save
    monkeypatch.setattr(
        type(first.pre), "save", lambda *args, **kw: (written.append(args), save(*args, **kw))
    )
    trainer.train()
    assert not written and (tmp_path / "checkpoint-2" / "pre").is_dir()

    again = PReCallback(seed=5)
    trainer = saving(tiny_llava(), tmp_path, again)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # no step is left
    saved = apply_pre(tiny_llava(), from_pretrained=tmp_path / "checkpoint-4")
    assert all(torch.equal(heads_of(again.pre)[n], x) for n, x in heads_of(saved).items())


def test_the_end_of_training_writes_them(tmp_path: Path) -> None:
    """As `save_model` then writes the adapter alone; a full model's writes both."""
    callback = PReCallback()
    trainer = saving(with_lora(), tmp_path / "out", callback, save_steps=9)
    trainer.train()
    trainer.save_model()
    saved = apply_pre(tiny_llava(), from_pretrained=tmp_path / "out")
    assert all(torch.equal(heads_of(callback.pre)[n], x) for n, x in heads_of(saved).items())
    for model, how in ((with_lora(), {"save_strategy": "no"}), (tiny_llava(), {"save_steps": 9})):
        saving(model, tmp_path / "none", PReCallback(), **how).train()
        assert not (tmp_path / "none" / "pre").exists()


def test_a_checkpoint_that_it_is_not_told_of(tmp_path: Path) -> None:
    """Another run's, in the output directory, has the same name and another history."""
    for name, seed in (("a", 0), ("b", 1)):
        saving(with_lora(), tmp_path / name, PReCallback(seed=seed, weight=1.0 + seed)).train()
    for out in ("b", "c"):
        trainer = saving(with_lora(), tmp_path / out, PReCallback())
        with pytest.raises(ValueError, match=r"goes on from step 2, .* expected it at .*named in"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.parametrize("flag", ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))
def test_heads_in_the_state_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    """FSDP and DeepSpeed save and load them."""
    callback = PReCallback()
    trainer = saving(with_lora(), tmp_path, callback)
    monkeypatch.setenv(flag, "true")
    trainer.state.global_step = 2
    (tmp_path / "checkpoint-2").mkdir(parents=True)
    for event in (callback.on_save, callback.on_train_begin):
        event(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert not any((tmp_path / "checkpoint-2").iterdir())


def test_in_a_pretrainer_it_attaches_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for name in ("first", "second"):
        callback = PReCallback(weight=WEIGHT)
        trainer = saving(with_lora(), tmp_path, callback, cls=PReTrainer, max_steps=4)
        monkeypatch.setattr(callback.pre, "metrics", None)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if states else None)
        states.append({name: x.clone() for name, x in trainer.model.state_dict().items()})
        assert trainer.pre is callback.pre and "pre_loss" in trainer.state.log_history[0]
    assert all(torch.equal(states[1][name], x) for name, x in states[0].items())


def test_what_it_cannot_do_is_told(tmp_path: Path) -> None:
    with warnings_of("prereg_kernels.trainers.callback") as said:
        for count in (1, 2):
            saving(
                tiny_llava(),
                tmp_path,
                PReCallback(),
                gradient_accumulation_steps=count,
                max_steps=1,
            ).train()
    assert len(said) == 1 and "with_pre(TrainerClass) makes it the mean over all" in said[0]


def test_models_and_optimizers_that_it_cannot_reach(tmp_path: Path) -> None:
    trainer = make_trainer(
        None, tmp_path, Trainer, callbacks=[PReCallback()], model_init=lambda: tiny_llava()
    )
    with pytest.raises(ValueError, match="got another, as model_init makes one for each run"):
        trainer.train()
    model = tiny_llava()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = saving(model, tmp_path, PReCallback(), optimizers=(early, None))
    with pytest.raises(ValueError, match="optimizer: expected PRe's heads in its param_groups"):
        trainer.train()
    trainer = saving(tiny_llava(), tmp_path, PReCallback(head_learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"with head_learning_rate=0\.001 .*parameter_groups"):
        trainer.train()


def test_a_model_that_has_it(tmp_path: Path) -> None:
    model, callback = tiny_llava(), PReCallback()
    pre = apply_pre(model)
    pre.heads[2].requires_grad_(False)
    saving(model, tmp_path, callback)
    assert callback.pre is pre and all(p.requires_grad for p in pre.heads[2].parameters())
    with pytest.raises(ValueError, match="attached by the settings layers"):
        saving(model, tmp_path, PReCallback(layers=1))
    with pytest.raises(TypeError, match="wieght: not a setting"):
        PReCallback(wieght=1)
