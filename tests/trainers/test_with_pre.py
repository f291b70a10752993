# SPDX-License-Identifier: Apache-2.0
"""with_pre: a trainer's class that attaches PRe itself, whatever way it gets its model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, Trainer

from prereg_kernels import PReConfig, apply_pre, find_pre, remove_pre
from prereg_kernels.attach.handle import get_pre
from prereg_kernels.trainers import PReTrainer, PReTrainerMixin, with_pre
from tests.attach.test_regularizer import traces
from tests.attached import compare
from tests.tiny import tiny_llava
from tests.trainers.rows import WEIGHT, Gradients, eager_gradients, make_rows, make_trainer

Plain = with_pre(Trainer, weight=WEIGHT)


class Loading(Trainer):
    """As TRL's SFTTrainer: the model may be a path, and `peft_config` wraps it."""

    def __init__(self, model: Any = None, *args: Any, peft_config: Any = None, **kw: Any) -> None:
        if isinstance(model, str):
            model = LlavaForConditionalGeneration.from_pretrained(model).train()
        if peft_config is not None:
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft_config)
        super().__init__(model, *args, **kw)


class Mixed(PReTrainerMixin, Loading):
    pass


PReLoading = with_pre(Loading, weight=WEIGHT)
PReMixed = with_pre(Mixed, weight=WEIGHT)
LORA = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)


def a_model(kind: str, folder: Path) -> Any:
    model = tiny_llava()
    if kind != "named":
        return model
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("size, count", ((8, 1), (2, 4), (1, 8)))
@pytest.mark.parametrize("kind", ("given", "named", "made"))
def test_gradients_of_a_step(tmp_path: Path, kind: str, size: int, count: int) -> None:
    """However the model comes and the step is cut, those of the definition."""
    keeper, own = Gradients(), {}
    if kind == "made":
        own["model_init"] = lambda: tiny_llava()
    trainer = make_trainer(
        None if kind == "made" else a_model(kind, tmp_path / "model"), tmp_path, PReLoading,
        per_device_train_batch_size=size, gradient_accumulation_steps=count, callbacks=[keeper],
        learning_rate=0.0, optim="sgd", **own,
    )  # fmt: skip
    first = get_pre(trainer.model)
    trainer.train()
    assert first is not None and (trainer.pre is first) == (kind != "made")
    compare(keeper.steps[0], eager_gradients(trainer.pre.heads, make_rows()))


@pytest.mark.parametrize("cls", (PReLoading, PReMixed), ids=("plain", "mixed"))
@pytest.mark.parametrize("kind", ("given", "named"))
def test_a_step_moves_the_heads_beside_an_adapter(tmp_path: Path, kind: str, cls: Any) -> None:
    """`peft_config` froze them, or came before them; and a step of SGD is rate * gradient."""
    steps = []
    for size, count in ((4, 1), (2, 2)):
        keeper = Gradients()
        model, rows = a_model(kind, tmp_path / "model"), make_rows((1, 2, 0, 3))

        class Adapted(cls):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, peft_config=LORA, **kwargs)

        trainer = make_trainer(
            model, tmp_path, Adapted, rows=rows, per_device_train_batch_size=size,
            gradient_accumulation_steps=count, callbacks=[keeper], learning_rate=0.1, optim="sgd",
        )  # fmt: skip
        assert type(trainer.model).__name__ == "PeftModel"
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        for name, p in trainer.model.named_parameters():
            is_trained = "pre_heads" in name or "lora_" in name
            assert p.requires_grad == is_trained
            expected = before[name] - 0.1 * keeper.steps[0][name]
            torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)
            assert torch.equal(p, before[name]) != is_trained
        steps.append(keeper.steps[0])
    for name, x in steps[0].items():
        torch.testing.assert_close(steps[1][name], x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", (None, LORA), ids=("full", "lora"))
def test_resumed_training_is_uninterrupted_training(tmp_path: Path, adapter: Any) -> None:
    """A checkpoint has the heads, beside an adapter too."""
    states = []
    for seed, checkpoint in ((0, None), (5, str(tmp_path / "checkpoint-2"))):
        model = tiny_llava(0 if adapter else seed)
        if adapter:
            torch.manual_seed(seed)
            model = peft.get_peft_model(model, adapter)
        trainer = make_trainer(
            model, tmp_path, with_pre(Trainer, seed=seed, head_learning_rate=0.05),
            per_device_train_batch_size=2, max_steps=4, save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append({name: x.clone() for name, x in trainer.model.state_dict().items()})
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert all({"pre_loss", "lm_loss", "pre_grad_norm"} <= log.keys() for log in logs)
    assert (tmp_path / "checkpoint-4" / "pre" / "pre_heads.safetensors").is_file()
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file() == bool(adapter)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], x) for name, x in states[0].items())


def test_a_model_that_has_it_is_left_as_it_is(tmp_path: Path) -> None:
    model = tiny_llava()
    pre = apply_pre(model, layers=1)
    assert find_pre(make_trainer(model, tmp_path, with_pre(Trainer)).model) is pre
    before = traces(model)
    with pytest.raises(ValueError, match="without PRe, which is attached by the settings weight;"):
        make_trainer(model, tmp_path, Plain)
    assert traces(model) == before


def test_a_trainer_that_cannot_be_made_leaves_the_model_alone(tmp_path: Path) -> None:
    model = tiny_llava()
    before = traces(model)
    with pytest.raises(ValueError, match="eval_strategy"):  # which there is nothing for
        make_trainer(model, tmp_path, Plain, eval_strategy="steps")
    assert traces(model) == before


def test_a_wrapper_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call apply_pre\(model\._orig_mod\)"):
        make_trainer(torch.compile(tiny_llava()), tmp_path, Plain)


def test_the_mixin_alone_attaches_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one with PRe attached, got a plain Llava"):
        make_trainer(tiny_llava(), tmp_path, Mixed)


def test_the_class() -> None:
    assert Plain.__name__ == Plain.__qualname__ == "PReTrainer"
    assert PReLoading.__name__ == "PReLoading" and PReLoading.__module__ == __name__
    assert pickle.loads(pickle.dumps(PReLoading)) is PReLoading
    for cls, base in ((PReLoading, Loading), (PReMixed, Mixed)):
        assert issubclass(cls, base) and issubclass(cls, PReTrainerMixin)
        assert [kind.__name__ for kind in cls.__mro__].count("PReTrainerMixin") == 1
    again = with_pre(PReLoading, layers=1)
    assert again.pre_settings == {"weight": WEIGHT, "layers": 1}
    assert PReLoading.pre_settings == {"weight": WEIGHT}
    assert with_pre(PReTrainer).__name__ == "PReTrainer"


def test_settings_are_those_of_apply_pre(tmp_path: Path) -> None:
    config = PReConfig(layers=(1, 3))
    pre = find_pre(make_trainer(tiny_llava(), tmp_path, with_pre(Trainer, config=config)).model)
    assert list(pre.heads) == [1, 3]
    pre.save(tmp_path / "heads")
    cls = with_pre(Trainer, from_pretrained=tmp_path / "heads", weight=2.0)
    again = find_pre(make_trainer(tiny_llava(), tmp_path, cls).model)
    assert list(again.heads) == [1, 3] and again.config.weight == 2.0


@pytest.mark.parametrize(
    "trainer, settings, error, message",
    (
        (nn.Linear, {}, TypeError, "trainer: expected a class of transformers' Trainer"),
        ("Trainer", {}, TypeError, "trainer: expected a class of transformers' Trainer"),
        (Trainer, {"wieght": 1}, TypeError, "wieght: not a setting of PRe"),
        (Trainer, {"weight": -1}, ValueError, "weight: expected a non-negative"),
    ),
)
def test_mistakes_are_told_before_there_is_a_model(
    trainer: Any, settings: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        with_pre(trainer, **settings)


def test_a_model_whose_pre_was_removed(tmp_path: Path) -> None:
    """Its next trainer attaches it anew."""
    model = tiny_llava()
    make_trainer(model, tmp_path, Plain)
    remove_pre(model)
    assert isinstance(
        find_pre(make_trainer(model, tmp_path, Plain).model).heads[2].weight_0, Tensor
    )
