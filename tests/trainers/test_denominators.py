# SPDX-License-Identifier: Apache-2.0
"""PReTrainer's gradient is that of the whole step, however it is cut into micro-batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

from prereg_kernels import apply_pre, find_pre, remove_pre
from prereg_kernels.trainers import PReTrainer, PReTrainerMixin
from tests.attached import compare
from tests.releases import HERE
from tests.tiny import PATCHES, gradients, tiny_llava
from tests.trainers.rows import (
    IMAGES,
    WEIGHT,
    Row,
    collate,
    eager_gradients,
    make_rows,
    make_trainer,
    step_gradients,
)
from tests.trainers.test_checkpoints import warnings_of


def cut(size: int) -> list[list[Row]]:
    rows = make_rows()
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def steps_of(out: Path, size: int, count: int, **arguments: Any) -> Any:
    """Each step's gradients, and the heads."""
    model = tiny_llava()
    model.accepts_loss_kwargs = arguments.pop("accepts_loss_kwargs", True)
    own = ("layers", "level", "token_fraction")
    settings = {name: arguments.pop(name) for name in own if name in arguments}
    pre = apply_pre(model, weight=WEIGHT, **settings)
    steps = step_gradients(model, out, size, count, **arguments)
    assert pre.denominator is None
    remove_pre(model)
    return steps, pre.heads


@pytest.mark.parametrize("size, count", ((8, 1), (2, 4), (1, 8)))
@pytest.mark.parametrize("average_tokens", (False, True))
def test_gradients_of_a_step(tmp_path: Path, size: int, count: int, average_tokens: bool) -> None:
    (ours,), heads = steps_of(tmp_path, size, count, average_tokens_across_devices=average_tokens)
    compare(ours, eager_gradients(heads, make_rows()))


def test_gradients_of_several_layers(tmp_path: Path) -> None:
    (ours,), heads = steps_of(tmp_path, 2, 4, layers=(1, 3))
    compare(ours, eager_gradients(heads, make_rows()))


@pytest.mark.parametrize("size, count", ((8, 1), (2, 4), (1, 8)))
def test_gradients_of_whole_images(tmp_path: Path, size: int, count: int) -> None:
    (ours,), heads = steps_of(tmp_path, size, count, level="global", layers=(1, 3))
    compare(ours, eager_gradients(heads, make_rows(), level="global"))


@pytest.mark.parametrize("size, count", ((8, 1), (2, 4), (1, 8)))
def test_gradients_of_a_fraction(
    tmp_path: Path, size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averaged over disjoint draws that together are all tokens, those of all tokens."""
    quarters = []
    for quarter in range(4):
        monkeypatch.setattr(
            "prereg_kernels.attach.hooks.choose_tokens",
            lambda tokens, *rest, q=quarter: torch.arange(tokens)[q::4],
        )
        (ours,), heads = steps_of(tmp_path, size, count, token_fraction=0.25)
        quarters.append(ours)
    mean = {n: torch.stack([q[n] for q in quarters]).mean(dim=0) for n in quarters[0]}
    compare(mean, eager_gradients(heads, make_rows()))


@pytest.mark.parametrize("size, count", ((8, 1), (2, 4)))
def test_gradients_where_trainer_divides_by_the_micro_batches(
    tmp_path: Path, size: int, count: int
) -> None:
    """As it does for Qwen2.5-VL; the LM loss is then a mean of means, L_PRe is what it was."""
    (ours,), heads = steps_of(tmp_path, size, count, accepts_loss_kwargs=False)
    compare(ours, eager_gradients(heads, make_rows(), groups=cut(size)))


@pytest.mark.parametrize("accepts_loss_kwargs", (False, True))
def test_the_last_step_has_fewer_micro_batches(tmp_path: Path, accepts_loss_kwargs: bool) -> None:
    steps, heads = steps_of(tmp_path, 2, 3, accepts_loss_kwargs=accepts_loss_kwargs)
    pieces = cut(2)
    assert len(steps) == 2
    for ours, batches in zip(steps, (pieces[:3], pieces[3:]), strict=True):
        rows = [row for batch in batches for row in batch]
        groups = None if accepts_loss_kwargs else batches
        compare(ours, eager_gradients(heads, rows, groups=groups))


@pytest.mark.compiled
def test_gradients_of_a_compiled_model(tmp_path: Path) -> None:
    """By `torch_compile=True`; the micro-batches have different numbers of images."""
    torch._dynamo.reset()
    counters.clear()
    rows, model = make_rows((2, 0, 1, 0), (1, 9, 5, 9)), tiny_llava()
    tower = model.model.get_image_features
    model.model.get_image_features = torch.compiler.disable(tower)  # PRe has no hook there
    pre = apply_pre(model, weight=WEIGHT)
    (ours,) = step_gradients(
        model, tmp_path, 2, 2, rows=rows, torch_compile=True, torch_compile_backend="aot_eager"
    )
    assert counters["stats"]["unique_graphs"] > 0
    remove_pre(model)
    compare(ours, eager_gradients(pre.heads, rows))


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The model's own loss, from its logits."""
    loss = torch.nn.functional.cross_entropy(
        outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return loss / num_items_in_batch


@pytest.mark.parametrize("accepts_loss_kwargs", (False, True))
def test_a_loss_function_of_the_users(tmp_path: Path, accepts_loss_kwargs: bool) -> None:
    """It gets the labels, the model does not."""
    (ours,), heads = steps_of(
        tmp_path, 2, 4, accepts_loss_kwargs=accepts_loss_kwargs, compute_loss_func=cross_entropy
    )
    compare(ours, eager_gradients(heads, make_rows()))


def test_label_smoothing(tmp_path: Path) -> None:
    """The heads' gradient is L_PRe's alone, and the same as without."""
    (smooth,), heads = steps_of(tmp_path, 2, 4, label_smoothing_factor=0.1)
    expected = eager_gradients(heads, make_rows())
    names = [name for name in expected if "pre_heads" in name]
    for name in names:
        assert torch.linalg.norm(smooth[name] - expected[name]) < 1e-5 * expected[name].norm()
    assert len(names) == 4


def test_a_step_without_visual_tokens(tmp_path: Path) -> None:
    model = tiny_llava()
    pre = apply_pre(model)
    rows = make_rows((0, 0, 0, 0))
    trainer = make_trainer(model, tmp_path, rows=rows, per_device_train_batch_size=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["pre_loss"] for log in logs] == [0.0, 0.0]
    assert all(p.grad is None or not p.grad.any() for p in pre.heads[2].parameters())


def test_evaluation_has_no_term(tmp_path: Path) -> None:
    model = tiny_llava()
    rows = make_rows()
    plain = make_trainer(model, tmp_path, cls=Trainer, eval_dataset=rows).evaluate()["eval_loss"]
    apply_pre(model)
    trainer = make_trainer(model, tmp_path, rows=rows[:2], eval_dataset=rows, learning_rate=0.0)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == plain


def test_a_loss_without_grad_has_no_term(tmp_path: Path) -> None:
    """Of a model in training mode, as a callback may ask for it."""
    model, batch = tiny_llava(), collate(make_rows())
    plain = model(**batch).loss
    apply_pre(model, value_in_forward=True)
    trainer = make_trainer(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(trainer.compute_loss(model, batch), plain)


class UnknownItems(Trainer):
    """One that does not know the labels of a step, so it divides by the micro-batches."""

    def get_batch_samples(self, *args: Any) -> Any:
        return super().get_batch_samples(*args)[0], None


class PReUnknownItems(PReTrainerMixin, UnknownItems):
    pass


def test_a_step_of_unknown_labels(tmp_path: Path) -> None:
    """The LM loss is a mean of means, and so is its figure."""
    (ours,), heads = steps_of(tmp_path, 2, 4, cls=PReUnknownItems)
    compare(ours, eager_gradients(heads, make_rows(), groups=cut(2)))
    model = tiny_llava()
    apply_pre(model)
    trainer = make_trainer(
        model, tmp_path, cls=PReUnknownItems, per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    rounded = 0 if HERE >= (5, 0) else 5e-5
    assert log["lm_loss"] == pytest.approx(log["loss"], rel=1e-5, abs=rounded)


def test_a_stream_that_ends_within_a_step(tmp_path: Path) -> None:
    """Its length is not known, so Trainer asks for three micro-batches, and gets two."""
    model = tiny_llava()
    model.accepts_loss_kwargs = False
    pre = apply_pre(model)
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=3)
    batches = [collate(rows) for rows in cut(4)]
    trainer.get_batch_samples(iter(batches), 3, torch.device("cpu"))
    assert pre.denominator == sum(IMAGES) * PATCHES / 2


@pytest.mark.skipif(HERE < (5, 24), reason="Trainer asks no subclass before")
@pytest.mark.parametrize("is_scaled", (True, False, None))
def test_gradients_where_a_trainer_says_what_it_divides(
    tmp_path: Path, is_scaled: bool | None
) -> None:
    """With True the sum over micro-batches is its own business; with False it is their mean."""

    class Own(PReTrainer):
        loss_is_scaled_for_ga = is_scaled

    model = tiny_llava()
    pre = apply_pre(model, weight=WEIGHT)
    (found,) = step_gradients(model, tmp_path, 4, 2, cls=Own)
    expected = eager_gradients(pre.heads, make_rows())
    for name in (name for name in expected if "pre_heads" in name):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_ranks_that_share_a_batch_count_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks, two by two under tensor parallelism: gradients are averaged over two."""
    model = tiny_llava()
    pre = apply_pre(model)
    trainer = make_trainer(model, tmp_path, average_tokens_across_devices=False)
    parallelism = SimpleNamespace(tp_size=2, cp_size=1, sp_size=1, non_data_parallel_size=2)
    ranks = SimpleNamespace(
        num_processes=4, parallelism_config=parallelism, reduce=lambda rows, reduction: 4 * rows
    )
    monkeypatch.setattr(trainer, "accelerator", ranks)
    trainer.get_batch_samples(iter([collate(make_rows())]), 1, torch.device("cpu"))
    assert pre.denominator == 2 * sum(IMAGES) * PATCHES / 2


def test_a_trained_model_has_its_term_again(tmp_path: Path) -> None:
    """A loop of the user's own may follow, and no graph of the last step is kept for it."""
    model, batch = tiny_llava(), collate(make_rows())
    pre = apply_pre(model)
    trainer = make_trainer(model, tmp_path, per_device_train_batch_size=4)
    trainer.train()
    assert pre.loss is None
    model.zero_grad()
    model(**batch).loss.backward()
    assert gradients(model)["pre_heads.2.weight_0"].norm() > 0 and pre.loss is None


def test_a_term_that_is_kept_apart_stays_so(tmp_path: Path) -> None:
    """In a loop of the user's own that follows, which adds it."""
    model, batch = tiny_llava(), collate(make_rows())
    pre = apply_pre(model)
    pre.add_to_loss = False
    make_trainer(model, tmp_path, per_device_train_batch_size=4).train()
    model(**batch)
    assert pre.loss is not None


def test_a_model_without_pre(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: .* plain Llava.*call prereg_kernels\.apply_pre"):
        make_trainer(tiny_llava(), tmp_path)


def test_frozen_heads(tmp_path: Path) -> None:
    model = tiny_llava()
    pre = apply_pre(model)
    trainer = make_trainer(model, tmp_path)
    pre.heads[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"pre\.heads: expected heads that train, got a frozen"):
        trainer.train()


def test_counts_that_miss_what_the_passes_see(tmp_path: Path) -> None:
    """The term has no weight then; it is said when the figures are read anyway."""

    class Uncounted(PReTrainer):
        def count_rows(self, batch: Any) -> Tensor:
            return torch.zeros((), dtype=torch.int64)

    model = tiny_llava()
    apply_pre(model)
    trainer = make_trainer(model, tmp_path, cls=Uncounted)
    seen = sum(IMAGES) * PATCHES
    with pytest.raises(ValueError, match=f"count_rows: .* passes saw {seen}, got 0; override it"):
        trainer.train()
    assert all(p.isfinite().all() for p in model.parameters())


def test_several_gpus_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    apply_pre(model)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="expected a process per GPU, got 2 GPUs"):
        make_trainer(model, tmp_path)


@pytest.mark.parametrize("name", ("cp_size", "sp_size"))
def test_images_that_pieces_of_sequences_may_cut(tmp_path: Path, name: str) -> None:
    class Pieces(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(**{name: 2}))

    class PRePieces(PReTrainerMixin, Pieces):
        pass

    model = tiny_llava()
    apply_pre(model, level="global")
    with pytest.raises(ValueError, match="level: 'global' needs whole images on each rank"):
        make_trainer(model, tmp_path, cls=PRePieces)


class OtherLoss(PReTrainer):
    """One that puts a loss of its own in the place of PReTrainer's."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _, outputs = super().compute_loss(model, inputs, True)
        return outputs.logits.mean()


def test_a_loss_without_the_term(tmp_path: Path) -> None:
    model = tiny_llava()
    apply_pre(model)
    trainer = make_trainer(model, tmp_path, cls=OtherLoss)
    with pytest.raises(RuntimeError, match="the backward pass has not reached the term"):
        trainer.train()


class NoSuper(PReTrainer):
    """One that goes past PReTrainer: in its loss, or in the whole of a micro-batch."""

    method = "compute_loss"

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.method == "compute_loss":
            return Trainer.compute_loss(self, model, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.method == "training_step":
            return Trainer.training_step(self, *args, **kwargs)
        return super().training_step(*args, **kwargs)


def test_a_subclass_that_does_not_call_it(tmp_path: Path) -> None:
    model = tiny_llava()
    apply_pre(model)
    trainer = make_trainer(model, tmp_path, cls=NoSuper)
    with pytest.raises(RuntimeError, match=r"compute_loss of NoSuper .*super\(\)\.compute_loss"):
        trainer.train()
    NoSuper.method = "training_step"
    with warnings_of("prereg_kernels.trainers.trainer") as said:
        trainer.train()
    [message] = said
    assert "NoSuper did not come to PReTrainer's" in message


def test_a_loss_that_misses_the_model(tmp_path: Path) -> None:
    model = tiny_llava()
    apply_pre(model)
    trainer = make_trainer(model, tmp_path)
    other, batch = tiny_llava(), trainer.data_collator(make_rows()[:2])
    trainer.compute_loss(model, batch)  # the term of an earlier call is not this one's
    with pytest.raises(RuntimeError, match="made no training forward pass through the model"):
        trainer.training_step(other, batch)


def test_model_init(tmp_path: Path) -> None:
    """Trainer makes the model anew when it trains."""

    def make_model() -> Any:
        model = tiny_llava()
        apply_pre(model)
        return model

    trainer = make_trainer(None, tmp_path, model_init=make_model)
    first = trainer.pre
    trainer.train()
    assert trainer.pre is not first and trainer.pre is find_pre(trainer.model)
