# SPDX-License-Identifier: Apache-2.0
"""A trainer's hook on its PeftModel makes `inputs_embeds` of the ids, before PRe sees the call.

So ms-swift does with LoRA on Qwen2-VL, Qwen2.5-VL and InternVL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from prereg_kernels import apply_pre
from prereg_kernels.attach.families import family_of_type
from prereg_kernels.trainers import PReTrainer, PReTrainerMixin
from tests.attach.families.batches import VIDEO, has, make_batch
from tests.attach.families.models import make_model, pooled
from tests.releases import HERE
from tests.tiny import gradients
from tests.trainers.rows import make_trainer

DECODER = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
PIXELS = ("pixel_values", "pixel_values_videos")
GRIDS = ("image_grid_thw", "video_grid_thw")


def with_lora(name: str) -> Any:
    model = make_model(name)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=DECODER, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def inner(trained: Any) -> Any:
    return trained.get_base_model() if isinstance(trained, peft.PeftModel) else trained


def embed_first(trained: Any) -> None:
    """As the hook of ms-swift's templates: ids and pixels go, `inputs_embeds` come.

    Images and videos go through Qwen-VL's encoder by one call, images first.
    """
    model = inner(trained)

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        ids = kwargs.pop("input_ids")
        pixels = [kwargs.pop(name) for name in PIXELS if name in kwargs]
        grids = {name: kwargs.pop(name) for name in GRIDS if name in kwargs}
        embeddings = model.get_input_embeddings()(ids)
        if grids:
            features = model.model.visual(torch.cat(pixels), grid_thw=torch.cat([*grids.values()]))
            features = getattr(features, "pooler_output", features)
        elif pixels:
            features = torch.cat(pooled(model.get_image_features(*pixels)))
        if pixels:
            is_image, is_video = ids == model.config.image_token_id, ids == VIDEO
            images, videos = features.split([int(is_image.sum()), int(is_video.sum())])
            embeddings = embeddings.masked_scatter(is_image[..., None], images)
            embeddings = embeddings.masked_scatter(is_video[..., None], videos)
        if hasattr(model.model, "get_rope_index"):
            if HERE >= (5, 0):
                grids["mm_token_type_ids"] = kwargs.pop("mm_token_type_ids")
            shown = kwargs["attention_mask"]
            places, _ = model.model.get_rope_index(ids, **grids, attention_mask=shown)
            kwargs["position_ids"] = places
        return args, kwargs | {"inputs_embeds": embeddings}

    trained.register_forward_pre_hook(hook, with_kwargs=True)


class TwoCalls(Trainer):
    """Its loss is of two calls, of the batch and, past the hook, of another with ids of its own."""

    other: dict[str, Tensor]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Tensor = model(**inputs).loss + model.get_base_model()(**self.other).loss
        return loss


class PReTwoCalls(PReTrainerMixin, TwoCalls):
    pass


class Encodes(Trainer):
    """It encodes the images once more, for something else: before its call, or after it."""

    is_before: bool

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        pixels = inputs["pixel_values"]
        if self.is_before:
            inner(model).get_image_features(pixels)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.is_before:
            inner(model).get_image_features(pixels)
        return loss


class PReEncodes(PReTrainerMixin, Encodes):
    pass


def trainer_of(model: Any, out: Path, hooked: bool, cls: Any = PReTrainer, **settings: Any) -> Any:
    """With PRe attached; `settings` of PRe, and `label_smoothing_factor` of Trainer."""
    smoothing = settings.pop("label_smoothing_factor", 0.0)
    apply_pre(model, weight=3.0, **settings)
    if hooked:
        embed_first(model)
    return make_trainer(model, out, cls, label_smoothing_factor=smoothing)


def gradients_of(trainer: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    items = torch.tensor(50)
    trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items).backward()
    return gradients(trainer.model)


NAMES = ("llava", "qwen2_vl", "qwen2_5_vl", "internvl")
SCENES = ("several images", "video", "left padding", "text only")


@pytest.mark.parametrize("make", (with_lora, make_model), ids=("lora", "full"))
@pytest.mark.parametrize(
    "settings",
    ({}, {"label_smoothing_factor": 0.1}, {"level": "global"}, {"anchor": "pre_projector"}),
    ids=("plain", "smoothed", "global", "encoder"),
)
@pytest.mark.parametrize("name, scene", [(n, s) for n in NAMES for s in SCENES if has(n, s)])
def test_gradients(
    tmp_path: Path, name: str, scene: str, settings: dict[str, Any], make: Any
) -> None:
    """Where the model itself has the hook, after PRe's, PRe's pass has begun when it encodes."""
    ours = []
    for hooked in (False, True):
        trainer = trainer_of(make(name), tmp_path, hooked, **settings)
        ours.append(gradients_of(trainer, make_batch(name, make_model(name), scene).inputs))
    for name, x in ours[0].items():
        torch.testing.assert_close(ours[1][name], x, rtol=1e-5, atol=1e-7)
    heads = [x.norm() for name, x in ours[1].items() if "pre_heads" in name]
    assert len(heads) == 4 and all(norm > 0 for norm in heads) == (scene != "text only")


@pytest.mark.parametrize("name", ("llava", "qwen2_vl"))
def test_a_step_of_two_micro_batches(tmp_path: Path, name: str) -> None:
    """Counted before their passes, by the ids that these do not get."""
    steps = []
    for hooked in (False, True):
        trainer = trainer_of(with_lora(name), tmp_path, hooked)
        scenes = ("several images", "some text only")
        batches = [make_batch(name, make_model(name), scene).inputs for scene in scenes]
        _, items = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
        trainer.current_gradient_accumulation_steps = 2
        for batch in batches:
            trainer.training_step(trainer.model, batch, items)
        steps.append(gradients(trainer.model))
    for name, x in steps[0].items():
        torch.testing.assert_close(steps[1][name], x, rtol=1e-5, atol=1e-7)


def test_figures_of_an_evaluation(tmp_path: Path) -> None:
    batch, figures = make_batch("qwen2_vl", make_model("qwen2_vl")).inputs, []
    for hooked, has_labels in ((False, True), (True, True), (True, False)):
        trainer = trainer_of(with_lora("qwen2_vl"), tmp_path, hooked, value_in_eval=True)
        trainer.model.eval()
        given = {n: x for n, x in batch.items() if has_labels or n != "labels"}
        trainer.prediction_step(trainer.model, given, prediction_loss_only=True)
        figures.append(trainer.pre.metrics())
    assert figures[0]["pre_loss"] == pytest.approx(figures[1]["pre_loss"], rel=1e-5)
    assert figures[0]["pre_loss"] == pytest.approx(figures[2]["pre_loss"], rel=1e-5)
    assert figures[0]["visual_tokens"] == figures[2]["visual_tokens"] > 0


def test_a_call_with_ids_goes_by_its_own(tmp_path: Path) -> None:
    """Of the batch's shape, with its visual tokens elsewhere."""
    batch, ours = make_batch("llava", make_model("llava")).inputs, []
    turned = {n: x.flip(1) if n != "pixel_values" else x for n, x in batch.items()}
    assert turned["input_ids"].shape == batch["input_ids"].shape
    for hooked in (False, True):
        trainer = trainer_of(with_lora("llava"), tmp_path, hooked, PReTwoCalls)
        trainer.other = turned
        ours.append(gradients_of(trainer, batch))
    for name, x in ours[0].items():
        torch.testing.assert_close(ours[1][name], x, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("is_before", (True, False), ids=("before", "after"))
def test_what_else_is_encoded_is_not_the_anchor(tmp_path: Path, is_before: bool) -> None:
    """Before a call with pixels of its own, and after one whose pixels a hook took."""
    batch, ours = make_batch("llava", make_model("llava")).inputs, []
    for cls in (PReTrainer, PReEncodes):
        model = with_lora("llava")
        trainer = trainer_of(model, tmp_path, not is_before, cls, anchor="pre_projector")
        trainer.is_before = is_before
        gradients_of(trainer, batch)
        model.zero_grad()
        ours.append(gradients_of(trainer, batch))
    for name, x in ours[0].items():
        torch.testing.assert_close(ours[1][name], x, rtol=1e-5, atol=1e-7)


def test_one_call_for_images_and_videos_of_an_unknown_family(tmp_path: Path) -> None:
    """Nobody says which of its rows are which."""
    family = family_of_type("qwen2_vl")
    trainer = trainer_of(
        with_lora("qwen2_vl"), tmp_path, True, anchor="pre_projector", family=family
    )
    batch = make_batch("qwen2_vl", make_model("qwen2_vl"), "video").inputs
    with pytest.raises(ValueError, match=r"a call of 'model.visual.merger' for each kind of"):
        gradients_of(trainer, batch)


def test_an_encoder_that_nobody_ran() -> None:
    """The features were made before, outside of a trainer."""
    model = make_model("llava")
    batch = make_batch("llava", model)
    pre = apply_pre(model, anchor="pre_projector")
    embeddings = model.get_input_embeddings()(batch.inputs["input_ids"]).detach()
    embeddings[batch.visual] = batch.features
    pre.next_visual_mask = batch.visual
    message = "'pre_projector' expected the model's call to run 'model.multi_modal_projector'"
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=embeddings, labels=batch.inputs["labels"])


def test_a_sequence_of_another_shape_is_not_the_batch(tmp_path: Path) -> None:
    """Nor is a call outside of the trainer's."""
    batch = make_batch("llava", make_model("llava")).inputs
    trainer = trainer_of(with_lora("llava"), tmp_path, True, PReTwoCalls)
    embeddings = trainer.model.get_input_embeddings()(batch["input_ids"])
    trainer.other = {"inputs_embeds": embeddings[:, 1:], "labels": batch["labels"][:, 1:]}
    with pytest.raises(ValueError, match=r"PRe finds the visual tokens by it.*got None"):
        trainer.compute_loss(trainer.model, dict(batch))
    with pytest.raises(ValueError, match=r"PRe finds the visual tokens by it.*got None"):
        trainer.model(**batch)


def test_a_model_of_a_type_that_nobody_listed(tmp_path: Path) -> None:
    """The embedding table shows nothing within its call, and is not asked for."""
    lora = with_lora("llava")
    lora.get_base_model().config.model_type = "llava_of_tomorrow"
    trainer = trainer_of(lora, tmp_path, True)
    ours = gradients_of(trainer, make_batch("llava", make_model("llava")).inputs)
    assert all(x.norm() > 0 for name, x in ours.items() if "pre_heads" in name)
