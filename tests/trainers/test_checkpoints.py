# SPDX-License-Identifier: Apache-2.0
"""PReTrainer's checkpoints: a plain model, and the heads beside it, which come back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback

from prereg_kernels import apply_pre
from prereg_kernels._util import distributed
from prereg_kernels.trainers import PReCallback
from prereg_kernels.trainers.checkpoints import load_weights
from tests.attach.families.test_family import PeftModel
from tests.releases import HERE
from tests.tiny import tiny_llava
from tests.trainers.rows import make_rows, make_trainer


def trainer_on(out: Path, seed: int = 0, tied: bool = False, **arguments: Any) -> Any:
    """On a model of this seed, and heads of this seed; saves at steps 3 and 6."""
    model = tiny_llava(seed)
    if tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
    plain = arguments.get("cls") is Trainer
    if not plain or arguments.pop("pre", False):
        own = {"layers": (1, 3), "token_fraction": 1.0}
        settings = {name: arguments.pop(name, value) for name, value in own.items()}
        apply_pre(model, seed=seed, **settings)
    defaults: dict[str, Any] = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1,
        "train_sampling_strategy": "random", "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "lr_scheduler_type": "linear", "max_grad_norm": 1.0,
    }  # fmt: skip
    return make_trainer(model, out, **(defaults | arguments))


def state_of(trainer: Any) -> dict[str, Tensor]:
    """The model's state, and the optimizer's."""
    state = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()["state"]
    return state | {
        f"{number} {name}": torch.as_tensor(x).clone()
        for number, entry in optimizer.items()
        for name, x in entry.items()
    }


def warnings_of_trainer() -> AbstractContextManager[list[str]]:
    """The warnings that Trainer logs."""
    return warnings_of("transformers.trainer")


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """The warnings that go to a logger."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger(name), Keep(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert ours.keys() == expected.keys()
    return all(torch.equal(ours[name], x) for name, x in expected.items())


def test_resumed_training_is_uninterrupted_training(tmp_path: Path) -> None:
    """Bitwise, heads and optimizer included, from other initial weights and heads."""
    whole = trainer_on(tmp_path / "whole")
    initial = state_of_heads(whole)
    whole.train()
    resumed = trainer_on(tmp_path / "resumed", seed=7)
    assert not same(state_of_heads(resumed), initial)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same(state_of(resumed), state_of(whole))
    assert not same(state_of_heads(whole), initial)
    assert sum("exp_avg" in name for name in state_of(whole)) > 2 * 8
    logs = [[x for x in t.state.log_history if "loss" in x] for t in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(tmp_path: Path) -> None:
    whole = trainer_on(tmp_path, token_fraction=0.5)
    whole.train()
    resumed = trainer_on(tmp_path / "resumed", token_fraction=0.5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(state_of(resumed), state_of(whole))
    assert resumed.pre.passes == whole.pre.passes == 12


def state_of_heads(trainer: Any) -> dict[str, Tensor]:
    named = trainer.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "pre_heads" in name}


def test_resume_after_an_interruption(tmp_path: Path) -> None:
    """Of one directory: stopped between checkpoints, it goes on from the last."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = trainer_on(tmp_path / "whole")
    whole.train()
    stopped = trainer_on(tmp_path / "other", callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.pre.denominator is None
    resumed = trainer_on(tmp_path / "other", seed=3)
    resumed.train(resume_from_checkpoint=True)
    assert same(state_of(resumed), state_of(whole))


def test_a_push_in_training_has_the_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer copies the files that it knows of a checkpoint to what it pushes."""
    pushed: list[dict[str, Tensor]] = []

    def push(self: Any, checkpoint_folder: str) -> None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        heads = load_file(Path(self.args.output_dir) / "pre" / "pre_heads.safetensors")
        pushed.append({name: x.clone() for name, x in heads.items()})

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = trainer_on(tmp_path / "a")
    trainer.train()
    callback = PReCallback()
    other = trainer_on(
        tmp_path / "b", cls=Trainer, callbacks=[callback], gradient_accumulation_steps=1
    )
    other.train()
    for each, step in ((trainer, 3), (trainer, 6), (other, 3), (other, 6)):
        checkpoint = Path(each.args.output_dir) / f"checkpoint-{step}"
        each.state.global_step = step
        each._push_from_checkpoint(str(checkpoint))
        saved = load_file(checkpoint / "pre" / "pre_heads.safetensors")
        assert same(pushed[-1], saved)
    assert not same(pushed[0], pushed[1]) and not same(pushed[2], pushed[3])


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for name in ("checkpoint-3", "checkpoint-6", "final"):
        files = {path.name for path in (tmp_path / name / "pre").iterdir()}
        assert files == {"pre_heads.safetensors"}
        _, info = LlavaForConditionalGeneration.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    model = tiny_llava()
    apply_pre(model, layers=(1, 3), seed=5).load(tmp_path / "final" / "pre")
    again = {name: x for name, x in model.named_parameters() if "pre_heads" in name}
    assert same(again, state_of_heads(trainer))


def test_heads_of_a_state_dict(tmp_path: Path) -> None:
    """FSDP and DeepSpeed hand one over, as their parameters are sharded; DeepSpeed may be empty."""
    trainer = trainer_on(tmp_path)
    state = {name: x + 1 for name, x in trainer.model.state_dict().items()}
    expected = {name: x.clone() for name, x in state.items() if name in state_of_heads(trainer)}
    trainer._save(str(tmp_path / "given"), state_dict=state)
    trainer.pre.load(tmp_path / "given" / "pre")
    assert same(state_of_heads(trainer), expected)
    _, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "given", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    trainer._save(str(tmp_path / "empty"), state_dict={})
    assert not (tmp_path / "empty" / "pre").exists()


def test_heads_of_a_model_inside_of_another(tmp_path: Path) -> None:
    """Whose own way to save knows nothing of them, as a PeftModel's."""
    model = tiny_llava()
    pre = apply_pre(model)
    trainer = make_trainer(PeftModel(model), tmp_path)
    assert trainer.pre is pre
    trainer._save(str(tmp_path / "saved"))
    again = apply_pre(tiny_llava(), from_pretrained=tmp_path / "saved")
    assert torch.equal(again.heads[2].weight_0, pre.heads[2].weight_0)


@pytest.mark.parametrize("tied", (False, True))
def test_no_warning_about_keys(tmp_path: Path, tied: bool) -> None:
    trainer_on(tmp_path, tied=tied).train()
    trainer = trainer_on(tmp_path, tied=tied)
    with warnings_of_trainer() as logged:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not [message for message in logged if "keys" in message]


@pytest.mark.parametrize("tied", (False, True))
def test_no_warning_beyond_those_of_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """Of a file with the modules' names; tied weights are in it once."""
    if HERE < (5, 0):  # whose `save_pretrained` knows no `save_original_format`
        monkeypatch.setattr(LlavaForConditionalGeneration, "_checkpoint_conversion_mapping", {})
    messages = []
    for name, cls in (("plain", {"cls": Trainer}), ("ours", {})):
        trained = trainer_on(tmp_path / name, tied=tied, **cls)
        trained.train()
        checkpoint = tmp_path / name / "checkpoint-6"
        trained.model.save_pretrained(checkpoint, save_original_format=False)
        trainer = trainer_on(tmp_path / name, seed=4, tied=tied, **cls)
        with warnings_of_trainer() as logged:
            trainer._load_from_checkpoint(str(checkpoint))
        messages.append([message for message in logged if "keys" in message])
        ours, expected = (trainer_.model.state_dict() for trainer_ in (trainer, trained))
        assert tied or same(ours, expected)
    assert messages[0] == messages[1]
    assert bool(messages[0]) == tied


def test_ignored_keys_of_the_models_own_stay_ignored(tmp_path: Path) -> None:
    out = str(tmp_path / "checkpoint-3")
    trainer_on(tmp_path).train()
    trainer = trainer_on(tmp_path, max_steps=3)
    model = trainer.model
    model.register_buffer("mine", torch.zeros(1))
    model._keys_to_ignore_on_save |= {"mine"}
    before = set(model._keys_to_ignore_on_save)
    with warnings_of_trainer() as logged:
        trainer._load_from_checkpoint(out)
    assert not logged and model._keys_to_ignore_on_save == before


def test_load_best_model_at_end(tmp_path: Path) -> None:
    """The heads of the best step come back with its model."""
    heads: dict[int, dict[str, Tensor]] = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heads[state.global_step] = state_of_heads(trainer)

    rows = make_rows()
    trainer = trainer_on(
        tmp_path, eval_dataset=make_rows(seed=1), rows=rows, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, learning_rate=0.2, callbacks=[Keep()],
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 6 and not same(heads[best], heads[6])
    assert same(state_of_heads(trainer), heads[best])


def test_the_best_heads_are_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As on a node that did not write them: a warning, and the heads stay."""
    trainer_on(tmp_path).train()
    trainer = trainer_on(tmp_path, seed=4)
    before = state_of_heads(trainer)
    best = tmp_path / "checkpoint-3"
    trainer.state.best_model_checkpoint = str(best)
    (best / "pre" / "pre_heads.safetensors").unlink()
    (best / "pre").rmdir()
    trainer._load_best_model()
    assert f"Could not locate the heads of the best model at {best}/pre" in caplog.text
    assert same(state_of_heads(trainer), before)


@pytest.mark.parametrize("each", (False, True))
def test_every_node_that_writes_a_model_writes_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: bool
) -> None:
    trainer = trainer_on(tmp_path, save_on_each_node=each)
    monkeypatch.setattr(distributed, "rank", lambda: 8)  # the first of the second node
    trainer._save(str(tmp_path / "model"))
    assert (tmp_path / "model" / "config.json").exists()
    assert (tmp_path / "model" / "pre").exists() == each


def test_a_checkpoint_without_heads(tmp_path: Path) -> None:
    """Of a Trainer that knew no PRe."""
    trainer_on(tmp_path, cls=Trainer).train()
    assert not (tmp_path / "checkpoint-6" / "pre").exists()
    with pytest.raises(FileNotFoundError, match=r"path: expected .*pre_heads\.safetensors"):
        trainer_on(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_layers(tmp_path: Path) -> None:
    trainer_on(tmp_path).train()
    with pytest.raises(ValueError, match=r"layers=\[1, 3\], expected \[2\]"):
        trainer_on(tmp_path, layers=2).train(resume_from_checkpoint=True)


def test_weights_are_read_by_the_models_own_config(tmp_path: Path) -> None:
    """A checkpoint's config.json may name a kernel, which transformers would fetch."""
    saved, model = tiny_llava(seed=1), tiny_llava(seed=2)
    saved.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["_attn_implementation"] = content["attn_implementation"] = "somebody/kernel"
    file.write_text(json.dumps(content), encoding="utf-8")
    result = load_weights(model, str(tmp_path))
    assert not result.missing_keys and not result.unexpected_keys
    ours, expected = model.state_dict(), saved.state_dict()
    assert all(torch.equal(ours[name], x) for name, x in expected.items())


def test_a_rank_that_does_not_write_saves_no_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer Trainers call all ranks, for the sake of models that are sharded."""
    trainer = trainer_on(tmp_path / "out", save_on_each_node=True)
    monkeypatch.setattr(Trainer, "_save", lambda self, output_dir, state_dict: None)
    for writes in (False, True):
        monkeypatch.setattr(type(trainer.args), "should_save", property(lambda _, w=writes: w))
        trainer._save(str(tmp_path / "saved"))
        assert (tmp_path / "saved" / "pre").is_dir() == writes
