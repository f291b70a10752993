# SPDX-License-Identifier: Apache-2.0
"""The samples: features are merged where `visual` says, and every batch trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attach.families.models import IMAGE, OUTSIDE, VIDEO
from tests.zoo import CASES, sample
from tests.zoo.sample import Batch

every_case = pytest.mark.parametrize("name", CASES)
# The language model's first layer, where no module is given what was merged as `inputs_embeds`.
FIRST_LAYERS = {
    "chameleon": "model.layers.0", "granite4_vision": "model.language_model.layers.0",
    "kosmos-2": "text_model.model.layers.0", "phi4_multimodal": "model.layers.0",
}  # fmt: skip
UNMERGED = {"git", "idefics", "mllama"}  # no feature takes the place of a token
ENCODER_DECODERS = {"blip-2+t5", "florence2", "t5gemma2"}
ONE_ID = {"glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga"}  # for images and videos
IMAGES_REQUIRED = {
    "blip-2", "blip-2+t5", "git", "idefics", "instructblip", "instructblip+llama",
    "instructblipvideo", "kosmos-2",
}  # fmt: skip
SOUNDS = {
    "gemma3n", "gemma4", "gemma4_unified", "inkling_mm_model", "phi4_multimodal",
    "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker",
}  # fmt: skip
CODES = {"chameleon", "emu3"}  # eight, of which images consist
EXPERTS = {
    "aria", "deepseek_ocr2", "ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "inkling_mm_model",
    "internvl+gpt_oss", "internvl+qwen3_moe", "kimi_k25", "llama4", "llava+mixtral",
    "llava+qwen3_next", "minimax_m3_vl", "mistral3+mistral4", "qwen3_5_moe",
    "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen4_exp", "step3p7",
}  # fmt: skip

EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k")  # what configs call it


@every_case
def test_scenes(name: str) -> None:
    """Videos wherever the config has an id for them; sounds beside images wherever it can."""
    case = sample(name)
    ids = [getattr(case.model.config, f"video_token_{end}", None) for end in ("id", "index")]
    videos = ids != [None, None] and name != "paddleocr_vl"  # which has no path for them
    expected = {
        "images": name != "instructblipvideo",
        "videos": videos,
        "mixed": (videos and name not in ONE_ID | {"instructblipvideo"}) or name in SOUNDS,
        "text only": name not in IMAGES_REQUIRED,
    }
    assert set(case.batches) == {scene for scene in expected if expected[scene]}
    for scene, batch in case.batches.items():
        assert any(map(of_sound, batch.inputs)) == (scene == "mixed" and name in SOUNDS)
        assert (batch.inputs["attention_mask"] == 0).any() or scene not in ("images", "mixed")


@every_case
def test_visual_is_where_the_placeholders_are(name: str) -> None:
    for scene, batch in sample(name).batches.items():
        expected = torch.isin(batch.inputs["input_ids"], torch.tensor([IMAGE, VIDEO, OUTSIDE]))
        assert batch.visual.equal(expected if name not in UNMERGED else expected & False), scene
        assert batch.visual.any() == (scene != "text only" and name not in UNMERGED), scene
        if name not in ENCODER_DECODERS:
            unlabelled = batch.visual | (batch.inputs["attention_mask"] == 0)
            assert (batch.inputs["labels"][unlabelled] == -100).all(), scene


@every_case
def test_pixels_change_the_visual_rows(name: str) -> None:
    """Some stay as they are: learned rows that end a line of patches, codes drawn again."""
    case = sample(name)
    for scene, batch in case.batches.items():
        changed = changed_rows(name, case.model, batch, lambda argument: not of_sound(argument))
        assert not (changed & ~batch.visual).any(), scene
        assert changed.sum() >= 0.5 * batch.visual.sum(), scene


@every_case
def test_visual_rows_are_neither_alike_nor_zero(name: str) -> None:
    """Those of the types with a quantiser are of a few codes."""
    case = sample(name)
    for scene, batch in case.batches.items():
        rows = merged(name, case.model, batch.inputs)[batch.visual]
        assert rows.any(dim=-1).all(), scene
        assert len(rows.unique(dim=0)) >= (8 if name in CODES and len(rows) else 0.5 * len(rows))


@every_case
def test_sounds_change_other_rows(name: str) -> None:
    case = sample(name)
    for scene, batch in case.batches.items():
        changed = changed_rows(name, case.model, batch, of_sound)
        assert not (changed & batch.visual).any(), scene
        assert changed.any() == any(map(of_sound, batch.inputs)), scene


def of_sound(argument: str) -> bool:
    return "features" in argument or "audio" in argument


def changed_rows(name: str, model: Any, batch: Batch, change: Callable[[str], bool]) -> Tensor:
    """Rows of what the language model is given that differ once the arguments are other noise."""
    generator = torch.Generator().manual_seed(1)
    inputs = dict(batch.inputs)
    for argument, value in inputs.items():
        if change(argument) and value.is_floating_point():
            changed = value + torch.randn(value.shape, generator=generator)
            inputs[argument] = changed.where(value != 0, 0.0)  # zeros are no image
        elif change(argument) and argument == "audio_input_ids":  # levels of each band
            inputs[argument] = value.flip(-1)
    before, after = merged(name, model, batch.inputs), merged(name, model, inputs)
    return (before != after).any(dim=-1)


@torch.no_grad()
def merged(name: str, model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the language model is given in place of the ids, (rows, length, width)."""
    rows: list[Tensor] = []
    shape = inputs["input_ids"].shape

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = kwargs.get("inputs_embeds") if name not in FIRST_LAYERS else args[0]
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            rows.append(value)

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if FIRST_LAYERS.get(name, path) == path:
                hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        model(**inputs)
    assert rows or name in UNMERGED
    return rows[-1] if rows else torch.zeros(*shape, 1)


@every_case
def test_every_batch_trains(name: str) -> None:
    """The same on every call, without dropout or other chance."""
    losses: dict[str, float] = {}
    for _ in range(2):
        case = sample(name)
        for scene, batch in case.batches.items():
            case.model.zero_grad()
            loss = case.model(**batch.inputs).loss
            loss.backward()
            assert losses.setdefault(scene, loss.item()) == loss.item(), scene
            gradients = [p.grad for p in case.model.parameters() if p.grad is not None]
            assert all(gradient.isfinite().all() for gradient in gradients), scene
    assert sum(p.numel() for p in case.model.parameters()) < 400_000
    assert {p.dtype for p in case.model.parameters()} == {torch.float32}


@every_case
def test_a_mixture_has_several_experts_that_learn(name: str) -> None:
    case = sample(name)
    assert bool(experts(case.model)) == (name in EXPERTS)
    if name not in EXPERTS:
        return
    text = case.model.config.get_text_config()
    assert {getattr(text, k) for k in EXPERTS_OF_A_TOKEN if hasattr(text, k)} == {2}
    case.model(**case.batches["images"].inputs).loss.backward()
    for learns in experts(case.model).values():
        assert len(learns) >= 4
        assert sum(learns) >= 2


def experts(model: Any) -> dict[str, list[bool]]:
    """Of each weight of a mixture, whether that of each expert has a gradient that is not zero.

    It is one parameter of all experts, or, in releases before 5, one of each.
    """
    found: dict[str, list[bool]] = {}
    for name, parameter in model.named_parameters():
        stack = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        if ".experts." in name and (parameter.ndim == 3 or stack != name):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            each = gradient.flatten(1) if parameter.ndim == 3 else gradient.flatten()[None]
            found.setdefault(stack, []).extend(each.any(dim=1).tolist())
    return found
