# SPDX-License-Identifier: Apache-2.0
"""The first steps are compared with the embedding table wherever people train, and no later ones.

A warning of the package is an error here, so that what runs is silent. Ranks are in tests/trainers,
torch.compile and PEFT in tests/integrations.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import Trainer

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.attach.first_steps import FirstSteps
from prereg_kernels.trainers import PReTrainer
from tests.attach.families.batches import make_batch as family_batch
from tests.attach.families.models import make_model
from tests.attach.misplaced import ERROR, FAMILY, WORD, right_batch, wrong_batch
from tests.attached import NON_REENTRANT, compare
from tests.releases import neftune_post_forward_hook
from tests.tiny import gradients, tiny_llava
from tests.trainers.rows import make_rows, make_trainer


def attach(**overrides: Any) -> Any:
    model = tiny_llava()
    apply_pre(model, family=FAMILY, **overrides)
    return model


def hooks_left(model: Any) -> int:
    """Of the package's own, on the embedding module."""
    hooks = model.get_input_embeddings()._forward_hooks.values()
    return sum(hook.__module__.startswith("prereg_kernels") for hook in hooks)


def alone(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


def checkpointing(model: Any, batch: Any) -> Tensor:
    model.gradient_checkpointing_enable(NON_REENTRANT)
    return alone(model, batch)


def inside(model: Any, batch: Any) -> Tensor:
    return checkpoint(partial(alone, model, batch), use_reentrant=False)


def keep_all(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def keep_what_the_check_does(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = ("clone", "ne", "any", "all", "sum", "zeros", "ones_like", "stack", "index")
    name = op.overloadpacket.__name__
    return CheckpointPolicy.MUST_SAVE if name in kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective(policy: Any) -> Any:
    context = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpoint, use_reentrant=False, context_fn=context)


def inside_selective(model: Any, batch: Any) -> Tensor:
    return selective(keep_what_the_check_does)(partial(alone, model, batch))


def selective_inside(model: Any, batch: Any) -> Tensor:
    """Around what calls the embedding module and the decoder."""
    model.model.forward = partial(selective(keep_all), model.model.forward)
    return alone(model, batch)


def autocast(dtype: torch.dtype, model: Any, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype):
        return alone(model, batch)


def bfloat16(model: Any, batch: Any) -> Tensor:
    pixels = batch["pixel_values"].bfloat16()
    return alone(model.bfloat16(), batch | {"pixel_values": pixels})


def noise(model: Any, batch: Any) -> Tensor:
    """NEFTune's, by the hook that Trainer registers."""
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    return alone(model, batch)


def input_gradients(model: Any, batch: Any) -> Tensor:
    model.enable_input_require_grads()
    return checkpointing(model, batch)


def dispatched(model: Any, batch: Any) -> Tensor:
    """By accelerate, which replaces each module's `forward`."""
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    return alone(model, batch)


PLACES: dict[str, Callable[[Any, Any], Tensor]] = {
    "alone": alone,
    "checkpointing": checkpointing,
    "inside a checkpoint": inside,
    "inside a selective checkpoint": inside_selective,
    "a selective checkpoint inside": selective_inside,
    "autocast to bfloat16": partial(autocast, torch.bfloat16),
    "autocast to float16": partial(autocast, torch.float16),
    "bfloat16": bfloat16,
    "noise": noise,
    "gradients of the input": input_gradients,
    "dispatched": dispatched,
}
each_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@each_place
def test_silent_where_all_is_right(place: Callable[[Any, Any], Tensor]) -> None:
    model = attach()
    for _ in range(2):
        place(model, right_batch()).backward()
    assert hooks_left(model) == 0
    model._prereg.check(right_batch()) if place is not bfloat16 else None


@each_place
def test_an_error_where_something_is_wrong(place: Callable[[Any, Any], Tensor]) -> None:
    model = attach()
    for _ in range(2):  # one that is caught does not hide the next
        with pytest.raises(ValueError, match=ERROR):
            place(copy.deepcopy(model), wrong_batch())
    model = attach()
    for _ in range(2):
        with pytest.raises(ValueError, match=ERROR):
            model(**wrong_batch())
    assert hooks_left(model) == 0


@pytest.mark.parametrize("place", (inside_selective, selective_inside))
def test_gradients_with_selective_checkpoints(place: Callable[[Any, Any], Tensor]) -> None:
    """Which expect the ops of the first run in the second, where nothing is compared."""
    model = attach()
    alone(model, right_batch()).backward()
    expected = gradients(model)
    model = attach()
    place(model, right_batch()).backward()
    compare(gradients(model), expected)


class Ops(TorchDispatchMode):
    """Counts ops, those that wait for the device too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def ops_of(model: Any, batch: Any) -> Counter[str]:
    model.zero_grad()
    with Ops() as ops:
        model(**batch).loss.backward()
    return ops.counts


def test_later_steps_compare_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run the ops of steps that are never looked at, and so wait no more often."""
    batch, model = right_batch(), attach()
    first, second, third = (ops_of(model, batch) for _ in range(3))
    monkeypatch.setattr(FirstSteps, "begin", lambda *_: None)
    assert second == third == ops_of(attach(), batch) != first
    assert first["_local_scalar_dense"] > second["_local_scalar_dense"]


def test_no_copy_outlives_the_comparison() -> None:
    """The layers run without it, and without the hook."""
    model, found = attach(), []
    embeddings, ids = model.get_input_embeddings(), right_batch()["input_ids"]
    rows = embeddings(ids).detach()

    def look(module: nn.Module, args: Any) -> None:
        alive = [x for x in gc.get_objects() if type(x) is Tensor and x.shape == rows.shape]
        tables = {x.data_ptr() for x in alive if torch.equal(x, rows)}
        found.append((len(tables - {rows.data_ptr()}), hooks_left(model)))

    for module in (model.model.vision_tower, model.get_decoder().layers[1]):
        module.register_forward_pre_hook(look)
    model(**right_batch())
    assert found == [(2, 1), (0, 0)]  # the module's output and the copy, then neither


def test_evaluation_is_not_looked_at_and_counts_for_nothing() -> None:
    model = attach(value_in_eval=True).eval()
    with torch.no_grad():
        model(**wrong_batch())
    with pytest.raises(ValueError, match=ERROR):
        model.train()(**wrong_batch())


def test_steps_with_other_arguments_are_looked_at() -> None:
    """The first video comes after steps of images, and its id was left out."""
    model = make_model("qwen2_5_vl")
    pre = apply_pre(model)
    family = pre.family
    remove_pre(model)
    apply_pre(model, family=replace(family, visual_tokens=("image_token_id",)))
    images = family_batch("qwen2_5_vl", model, "images").inputs
    video = family_batch("qwen2_5_vl", model, "video").inputs
    for _ in range(2):
        model(**images)
    with pytest.warns(UserWarning, match=r"get features .* ids: \d+ \(video_token_id\) x"):
        model(**video)
    model(**video)


def test_a_step_that_ran_out_of_memory_is_looked_at_again() -> None:
    """As with smaller batches, by accelerate's `find_executable_batch_size`."""
    model = attach()
    for error in (torch.OutOfMemoryError, KeyboardInterrupt):

        def fail(*args: Any, error: type[BaseException] = error) -> None:
            raise error

        for module in (model.model.vision_tower, model.get_decoder().layers[3]):
            hook = module.register_forward_pre_hook(fail)
            with pytest.raises(error):
                model(**right_batch())
            hook.remove()
            assert hooks_left(model) == 0
    with pytest.raises(ValueError, match=ERROR):
        model(**wrong_batch())


def test_another_thread_may_call_the_embedding_module() -> None:
    """Its rows are no part of this step, where they would make features look like rows."""
    model, batch = attach(), right_batch()
    embeddings, words = model.get_input_embeddings(), torch.full_like(batch["input_ids"], 7)

    def show_a_word(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: embeddings(words))
        thread.start()
        thread.join()
        return embeddings.weight[7].expand_as(output)

    model.model.multi_modal_projector.register_forward_hook(show_a_word)
    model(**batch).loss.backward()


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", (copy.deepcopy, by_pickle))
def test_copies_look_at_their_first_step(copied: Callable[[Any], Any]) -> None:
    model = attach()
    clone = copied(model)
    for each in (clone, model):
        with pytest.raises(ValueError, match=ERROR):
            each(**wrong_batch())
        each(**right_batch()).loss.backward()


def test_copies_look_at_what_is_new_to_them() -> None:
    model = attach()
    model(**right_batch())
    clone, wrong = copy.deepcopy(model), wrong_batch()
    del wrong["labels"]
    for each in (clone, model):
        each(**right_batch())
        with pytest.raises(ValueError, match=ERROR):
            each(**wrong)
        assert hooks_left(each) == 0


def test_a_check_leaves_no_trace() -> None:
    model = attach(token_fraction=0.5, value_in_eval=True)
    pre, tower = model._prereg, model.model.vision_tower.eval()
    model(**right_batch()).loss.backward()
    pre.next_visual_mask = mask = right_batch()["input_ids"] < 0
    metrics, passes, grads = pre.metrics(), pre.passes, gradients(model)
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    with pre.collecting() as collected:
        with pytest.warns(UserWarning, match="8 positions of the batch get features"):
            pre.check(right_batch())  # by the mask
        assert pre.next_visual_mask is mask
        pre.next_visual_mask = None
        pre.check(right_batch())
        with pytest.raises(ValueError, match=ERROR):
            pre.check(wrong_batch())
    assert not collected and pre.metrics() == metrics and pre.passes == passes
    assert [module.training for module in model.modules()] == modes and not tower.training
    assert all(torch.equal(x, grads[name]) for name, x in gradients(model).items())
    assert torch.equal(torch.get_rng_state(), random) and hooks_left(model) == 0
    model(**right_batch()).loss.backward()


def test_a_check_calls_no_method_that_changes_modes() -> None:
    """Some `eval` do more, such as adding adapters to weights, and nothing would undo that."""
    model = attach()
    model.train = model.eval = None
    model._prereg.check(right_batch())
    assert model.training


@pytest.mark.parametrize("cls", (Trainer, PReTrainer))
@pytest.mark.parametrize("is_right", (True, False))
def test_trainers(tmp_path: Path, cls: type[Trainer], is_right: bool) -> None:
    """With noise, evaluation between the steps, and micro-batches with and without images."""
    rows = make_rows()
    for row in rows:
        row["input_ids"][row["input_ids"] == WORD] = WORD + 1 if is_right else WORD
    rows[0]["input_ids"][-1] = WORD + is_right
    trainer = make_trainer(
        attach(), tmp_path, cls, rows, per_device_train_batch_size=2, eval_dataset=rows,
        gradient_accumulation_steps=2, neftune_noise_alpha=5.0, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    if is_right:
        trainer.train()
        assert trainer.state.global_step == 2
    else:
        with pytest.raises(ValueError, match=r"visual_tokens: of the .* visual positions"):
            trainer.train()
