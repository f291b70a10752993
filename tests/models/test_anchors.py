# SPDX-License-Identifier: Apache-2.0
"""Other anchors and levels on every model that allows them; the rest say why they do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre
from prereg_kernels.attach.families import family_of_type
from tests.attached import both, compare
from tests.encoder_rows import SOURCES, encoder_rows, source_of_tokens, watching
from tests.models.places import TRAINED, place_of
from tests.models.test_gradients import checkpointed
from tests.releases import here
from tests.zoo import sample

Counts = Mapping[str, tuple[int, ...]]

# The tokens of each image, in the order of the rows: as the builders of the zoo lay them out.
_ALIKE: Counts = {"images": (4, 4, 4)}
_SQUARES: Counts = {"images": (16, 16, 16)}
_QUERIES: Counts = {"images": (3, 3, 3)}
_TILES: Counts = {"images": (14, 16, 14)}
_GRIDS: Counts = {"images": (4, 6, 6)}
# A video is one run of tokens,
_WHOLE: Counts = {**_GRIDS, "videos": (12, 4), "mixed": (4, 6, 12, 6, 4)}
# a run for each chunk,
_CHUNKS: Counts = {**_GRIDS, "videos": (6, 4), "mixed": (4, 6, 6, 6, 4)}
# or for each frame, or pair of frames.
_FRAMES: Counts = {**_GRIDS, "videos": (6, 6, 4), "mixed": (4, 6, 6, 6, 6, 4)}
_ONE_ID: Counts = {**_GRIDS, "videos": (6, 6, 4)}
_QWEN2: Counts = {"images": (4, 15, 4), "videos": (12, 12), "mixed": (4, 12, 4)}
_GEMMA4: Counts = {"images": (4, 4, 4), "videos": (4,) * 4, "mixed": (4,) * 7}

IMAGES: Mapping[str, Counts] = {
    **dict.fromkeys(("internvl+qwen3_moe", "internvl+gpt_oss", "aria", "t5gemma2"), _ALIKE),
    **dict.fromkeys(("gemma3", "shieldgemma2", "paligemma", "paligemma+gemma2"), _ALIKE),
    **dict.fromkeys(("llava", "llava+gpt2", "llava+gptj", "llava+falcon", "llava+mpt"), _ALIKE),
    **dict.fromkeys(("llava+opt", "llava+gemma", "llava+granite", "llava+mixtral"), _ALIKE),
    **dict.fromkeys(("llava+qwen3_next", "llava+siglip", "fast_vlm", "kosmos-2.5"), _ALIKE),
    **dict.fromkeys(("blip-2", "blip-2+t5", "instructblip", "instructblip+llama"), _QUERIES),
    **dict.fromkeys(("vipllava", "deepseek_vl", "deepseek_vl_hybrid", "janus"), _SQUARES),
    **dict.fromkeys(("llava_next", "llava_next+mistral", "granite4_vision"), _TILES),
    **dict.fromkeys(("paddleocr_vl", "lighton_ocr"), _GRIDS),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "exaone4_5"), _WHOLE),
    **dict.fromkeys(("minimax_m3_vl", "muse_glimmer"), _GRIDS),
    **dict.fromkeys(("kimi_k25", "ernie4_5_vl_moe"), _CHUNKS),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "glm5_next"), _FRAMES),
    **dict.fromkeys(("cosmos3_omni", "cohere_compass"), _FRAMES),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga"), _ONE_ID),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2),
    **dict.fromkeys(("gemma4", "gemma4_unified"), _GEMMA4),
    "internvl": {"images": (4, 8, 4)},
    "qianfan_ocr": {"images": (4, 8, 4)},
    "chameleon": {"images": (64, 64, 64)},
    "cosmos3_edge": {
        **_GRIDS, "videos": (6, 6, 4, 4), "mixed": (4, 6, 6, 6, 6, 4, 4)
    },
    "deepseek_ocr2": {"images": (145, 289, 145)},
    "emu3": {"images": (72, 72, 72)},
    "florence2": {"images": (17, 17)},
    "gemma3n": {**_ALIKE, "mixed": (4, 4, 4)},
    "hunyuan_vl": {"images": (17, 22, 18)},
    "instructblipvideo": {"videos": (12, 12)},
    "kosmos-2": {"images": (4, 4)},
    "llava_next_video": {**_TILES, "videos": (2, 2), "mixed": (14, 16, 2, 14, 2)},
    "llava_onevision": {"images": (28, 32, 28), "videos": (13, 13), "mixed": (28, 13, 28)},
    "perception_lm": {**_ALIKE, "videos": (12, 12), "mixed": (4, 4, 12, 4, 12)},
    "phi4_multimodal": {"images": (13, 13), "mixed": (13, 13)},
    "qwen3_vl": {"images": (4, 15, 4), "videos": (6, 6, 6, 6), "mixed": (4, 6, 6, 4)},
    "video_llama_3": {
        **_GRIDS, "videos": (6, 4, 4, 3), "mixed": (4, 6, 6, 4, 6, 4, 3)
    },
    "video_llava": {**_ALIKE, "videos": (40, 40), "mixed": (4, 4, 40, 4, 40)},
}  # fmt: skip
# Its images are of lines with a token behind each one, of two sizes
UNEVEN = "llava+pixtral"
# One of each way to count and to lay out; the others are for the long run
FIRST = (
    "llava", "vipllava", "qwen2_vl", "qwen3_vl", "gemma3n", "glm5_next", "granite4_vision",
    "kosmos-2", "florence2", "video_llava", "qwen2_5_vl", "gemma3", "llama4",
)  # fmt: skip


def first(names: Any) -> list[Any]:
    return [pytest.param(n, marks=() if n in FIRST else pytest.mark.matrix) for n in names]


def run(name: str, scene: str, checkpointing: bool = False, **settings: Any) -> Any:
    batch = sample(name).batches[scene]
    ours, expected, metrics, (_, term) = both(
        batch.inputs, make=lambda: sample(name).model, mask=batch.visual,
        checkpointing=checkpointing, place=place_of(name), **settings,
    )  # fmt: skip
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4, abs=1e-7) and term != 0
    assert metrics["visual_tokens"] == batch.visual.sum()
    return metrics


# level="global"


def check_images(name: str, scene: str, checkpointing: bool) -> None:
    counts, batch = IMAGES[name][scene], sample(name).batches[scene]
    assert sum(counts) == batch.visual.sum()
    metrics = run(name, scene, checkpointing, level="global", images=counts, layers=(1, 2))
    assert metrics["images"] == len(counts)
    assert apply_pre(sample(name).model, level="global").count(batch.inputs) == len(counts)


@pytest.mark.parametrize("name", first(here(*IMAGES)))
def test_whole_images(name: str) -> None:
    check_images(name, next(reversed(IMAGES[name])), checkpointing=False)


@checkpointed
@pytest.mark.parametrize("name", here(*IMAGES))
@pytest.mark.matrix
def test_whole_images_of_every_scene(name: str, checkpointing: bool) -> None:
    for scene in IMAGES[name]:
        check_images(name, scene, checkpointing)


@pytest.mark.parametrize("name", [n for n in TRAINED if n != UNEVEN])
def test_every_scene_is_listed(name: str) -> None:
    """A video of these two comes in a run for each frame, but not in the zoo: an error says so."""
    scenes = {scene for scene in sample(name).batches if scene != "text only"}
    if name in ("minimax_m3_vl", "muse_glimmer"):
        for scene in ("videos", "mixed"):
            model = sample(name).model
            apply_pre(model, level="global")
            with pytest.raises(ValueError, match=r"got \d runs of them for \d images .*grid_thw"):
                model(**sample(name).batches[scene].inputs)
        scenes = {"images"}
    assert name not in IMAGES or {*IMAGES[name]} == scenes


@pytest.mark.parametrize("name", [n for n in TRAINED if n not in (*IMAGES, UNEVEN)])
def test_images_that_nothing_tells_apart(name: str) -> None:
    """Whoever calls it by a family of his own, which says nothing of images, too."""
    model = sample(name).model
    family = family_of_type(model.config.model_type)
    with pytest.raises(ValueError, match=r"^level: 'global' .* does not say which visual tokens"):
        apply_pre(model, level="global")
    assert family is None or family.images is None


def test_images_of_uneven_sizes() -> None:
    model = sample(UNEVEN).model
    apply_pre(model, level="global")
    with pytest.raises(
        ValueError, match=r"images of equally many tokens of LLaVA; .* image_sizes "
    ):
        model(**sample(UNEVEN).batches["images"].inputs)


# anchor="pre_projector"


def rows_of_tower(path: str) -> Any:
    """What a hook of its own sees the vision encoder return."""

    def rows(model: Any, inputs: Mapping[str, Any]) -> Tensor:
        seen: list[Any] = []
        hook = model.get_submodule(path).register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        [output] = seen
        return selected(model.config, output).flatten(0, 1).detach()

    return rows


def selected(config: Any, output: Any) -> Tensor:
    """(images, tokens, A)"""
    states = output.last_hidden_state
    if config.model_type == "llava":
        states = output.hidden_states[config.vision_feature_layer]
        drops = config.vision_feature_select_strategy == "default"
        return states[:, 1:] if drops else states
    if config.model_type == "vipllava":
        layers = config.vision_feature_layers
        return torch.cat([output.hidden_states[layer][:, 1:] for layer in layers], dim=-1)
    return states.flatten(2).mT if config.model_type == "fast_vlm" else states


TOWERS = {
    **dict.fromkeys([n for n in IMAGES if n.split("+")[0] in ("llava", "vipllava", "paligemma")],
                    "model.vision_tower"),
    "fast_vlm": "model.vision_tower",
    "deepseek_vl": "model.vision_model",
    "deepseek_vl_hybrid": "model.vision_model",
    "janus": "model.vision_model",
}  # fmt: skip


PROJECTED = (*TOWERS, *(n for n in TRAINED if n.split("+")[0] in SOURCES))


def rows_of(name: str) -> Any:
    return rows_of_tower(TOWERS[name]) if name in TOWERS else encoder_rows


@checkpointed
@pytest.mark.parametrize("name", first(here(*PROJECTED)))
def test_rows_of_the_encoder(name: str, checkpointing: bool) -> None:
    scene = next(reversed(sample(name).batches))
    run(name, scene, checkpointing, anchor="pre_projector", anchor_rows=rows_of(name))


@pytest.mark.parametrize("name", here(*PROJECTED))
@pytest.mark.matrix
def test_means_of_rows_of_the_encoder(name: str) -> None:
    for scene, images in IMAGES.get(name, {}).items():
        run(
            name, scene, anchor="pre_projector", level="global", images=images,
            anchor_rows=rows_of(name),
        )  # fmt: skip


@pytest.mark.parametrize("name", first(here(*(n for n in PROJECTED if n not in TOWERS))))
def test_each_row_is_what_its_token_is_made_of(name: str) -> None:
    """Other rows of half of the tokens, and of another half: the features of these change alone.

    In as many ways to halve them as tell each token from all others.
    """
    scene = next(reversed(sample(name).batches))
    model, batch = sample(name).model.eval(), sample(name).batches[scene]

    def entered(change: Any = None) -> tuple[Tensor, list[Tensor]]:
        states: list[Tensor] = []
        place = model.get_submodule(place_of(name).language_model)
        hook = place.register_forward_pre_hook(
            lambda module, args, kwargs: states.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad(), watching(model, change) as calls:
            model(**batch.inputs)
        hook.remove()
        return states[0][batch.visual], calls

    plain, calls = entered()
    source = source_of_tokens(model, batch.inputs, calls)
    assert sorted(source.tolist()) == list(range(len(plain)))
    tokens = torch.arange(len(plain))
    for bit in range(len(plain).bit_length()):
        chosen = (tokens >> bit) % 2 == 1
        other = torch.zeros_like(chosen)
        other[source[chosen]] = True

        def change(rows: Tensor, start: int, other: Tensor = other) -> None:
            rows[other[start : start + len(rows)]] *= torch.linspace(-2, 2, rows.shape[1])

        changed = (entered(change)[0] != plain).any(dim=1)
        assert changed.tolist() == chosen.tolist()


@pytest.mark.parametrize("name", [n for n in TRAINED if n not in (*PROJECTED, UNEVEN)])
def test_encoders_of_other_rows(name: str) -> None:
    model = sample(name).model
    family = family_of_type(model.config.model_type)
    why = "was given no projector" if family is None else f"{family.name} {family.regroups}"
    with pytest.raises(ValueError, match=r"^anchor: 'pre_projector' needs a row .*") as info:
        apply_pre(model, anchor="pre_projector")
    assert why in str(info.value)
