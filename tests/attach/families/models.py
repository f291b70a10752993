# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of each family, from configs, and how its processor would lay out pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.releases import HERE

WIDTH, LAYERS = 32, 4
WORDS = 48  # a vocabulary, the following ones included
IMAGE, VIDEO, NEW = 40, 41, 42  # NEW stands before and after everything visual
OUTSIDE = 50  # not in the vocabulary

Size = tuple[int, ...]  # (height, width) of an image, (frames, height, width) of a video
Rows = Sequence[Sequence[Size]]  # a list of images, or of videos, for each sequence of the batch
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A family, as the tests need it.

    Attributes:
        model: its class in transformers.
        config: a config of a few thousand parameters.
        sizes: images by name: "a", and "b" where images of one batch may differ in size.
        video: a video, where the family has a token for it.
        images, videos: their part of the model's arguments, in the order of the arguments of
            `get_image_features` and `get_video_features`.
        pieces: runs of tokens that the video is laid out as.
        types: further arguments, by a tensor that is 0 at text, 1 at images and 2 at videos.
        image_token: its id.
    """

    model: type[Any]
    config: Callable[[], Any]
    images: Callable[[Rows], Inputs]
    sizes: Mapping[str, Size]
    videos: Callable[[Rows], Inputs] | None = None
    video: Size | None = None
    pieces: int = 1
    types: Callable[[Tensor], Inputs] = lambda kinds: {}
    image_token: int = IMAGE


# Parts of configs.


def text(**more: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": WORDS,
        "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return sizes | more


def tower(**more: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    return sizes | more


def mrope(*section: int, **more: Any) -> dict[str, Any]:
    rotary = {"rope_type": "default", "mrope_section": list(section), **more}
    return as_released(text(rope_parameters=rotary))


QWEN_TOWER = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": NEW,
    "vision_end_token_id": NEW + 1,  # 4.57 reads the token after each that is a start's
}  # fmt: skip
# Tiles of 16 x 16, one or two a side.
TILES = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}


def as_released(config: dict[str, Any]) -> dict[str, Any]:
    """A config's values, as releases before 5 name those of rotary positions."""
    rotary = config.get("rope_parameters") or {}
    if HERE >= (5, 0) or "rope_type" not in rotary:
        return config
    others = {name: value for name, value in config.items() if name != "rope_parameters"}
    own = {n: x for n, x in rotary.items() if n in ("rope_theta", "partial_rotary_factor")}
    return {**others, "rope_scaling": rotary, **own}


def pooled(features: Any) -> list[Tensor]:
    """What `get_image_features` returns, for each image or in one piece.

    Releases before 5 return it bare, or, of Qwen3-VL, before what enters later layers.
    """
    features = getattr(features, "pooler_output", features)
    first = features[0]
    return list(first if isinstance(first, tuple | list) else features)


# Layouts of pixels.


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def flat(rows: Rows) -> list[Size]:
    return [size for row in rows for size in row]


def same_size(rows: Rows) -> Inputs:
    """Every image resized to that of the tower."""
    return {"pixel_values": noise(len(flat(rows)), 3, 16, 16)}


def anyres(rows: Rows) -> Inputs:
    """LLaVA-NeXT's tiles: a small copy of the whole image and the tiles, padded with zeros."""
    sizes = flat(rows)
    counts = [1 + -(-height // 16) * -(-width // 16) for height, width in sizes]
    pixels = noise(len(sizes), max(counts), 3, 16, 16)
    for image, count in zip(pixels, counts, strict=True):
        image[count:] = 0
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def tiles_as_images(rows: Rows) -> Inputs:
    """InternVL's tiles: one after another, like images."""
    count = sum(height // 16 * (width // 16) for height, width in flat(rows))
    return {"pixel_values": noise(count, 3, 16, 16)}


def images_by_row(rows: Rows) -> Inputs:
    """Idefics3's: (rows, images of the longest row), padding images are zero; masked borders."""
    longest = max(len(row) for row in rows)
    pixels = noise(len(rows), longest, 3, 16, 16)
    mask = torch.zeros(len(rows), longest, 16, 16, dtype=torch.bool)
    for number, row in enumerate(rows):
        pixels[number, len(row) :] = 0
        for image, (height, width) in enumerate(row):
            mask[number, image, :height, :width] = True
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def qwen_patches(sizes: Sequence[Size]) -> tuple[Tensor, Tensor]:
    """Patches of two frames by 4 x 4 pixels, and each input's grid of them."""
    grids = torch.tensor([(max(1, t // 2), h // 4, w // 4) for t, h, w in sizes])
    return noise(int(grids.prod(dim=1).sum()), 3 * 2 * 4 * 4), grids


def qwen_images(rows: Rows) -> Inputs:
    pixels, grids = qwen_patches([(1, *size) for size in flat(rows)])
    return {"pixel_values": pixels, "image_grid_thw": grids}


def qwen_videos(rows: Rows) -> Inputs:
    pixels, grids = qwen_patches(flat(rows))
    return {"pixel_values_videos": pixels, "video_grid_thw": grids}


def onevision_videos(rows: Rows) -> Inputs:
    videos = flat(rows)
    return {"pixel_values_videos": noise(len(videos), videos[0][0], 3, 16, 16)}


def mm_types(kinds: Tensor) -> Inputs:
    return {"mm_token_type_ids": kinds} if HERE >= (5, 0) else {}


def prefix_and_suffix(kinds: Tensor) -> Inputs:
    """PaliGemma's: 0 up to the last image of a row, 1 behind it."""
    images_to_come = kinds.flip(1).cumsum(dim=1).flip(1)
    return {"token_type_ids": (images_to_come == 0).long()}


# Configs.


def llava() -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**tower(), projection_dim=16),
        text_config=hf.LlamaConfig(**text()), image_token_id=IMAGE,
    )  # fmt: skip


def llava_next() -> Any:
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**tower(), projection_dim=16),
        text_config=hf.MistralConfig(**text()), image_token_index=IMAGE, **TILES,
    )  # fmt: skip


def llava_onevision() -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**tower(patch_size=4), vision_use_head=False),
        text_config=hf.Qwen2Config(**text()), image_token_index=IMAGE, video_token_index=VIDEO,
        vision_aspect_ratio="anyres_max_1",  # more than one tile is interpolated
        **TILES,
    )  # fmt: skip


def qwen2_vl() -> Any:
    return hf.Qwen2VLConfig(
        vision_config={**QWEN_TOWER, "embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2},
        text_config=mrope(2, 3, 3), **QWEN_TOKENS,
    )  # fmt: skip


def qwen2_5_vl() -> Any:
    vision = {
        **QWEN_TOWER, "hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 24,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return hf.Qwen2_5_VLConfig(vision_config=vision, text_config=mrope(2, 3, 3), **QWEN_TOKENS)


def qwen3_vl() -> Any:
    vision = {
        **QWEN_TOWER, "hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 24,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return hf.Qwen3VLConfig(
        vision_config=vision, text_config=mrope(4, 2, 2, mrope_interleaved=True), **QWEN_TOKENS
    )


def internvl() -> Any:
    return hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**tower(patch_size=4)),
        text_config=hf.Qwen2Config(**text()), image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip


def smolvlm() -> Any:
    return hf.SmolVLMConfig(
        vision_config=hf.SmolVLMVisionConfig(**tower(patch_size=4)),
        text_config=hf.LlamaConfig(**text()), image_token_id=IMAGE, pad_token_id=0,
    )  # fmt: skip


def idefics3() -> Any:
    return hf.Idefics3Config(
        vision_config=hf.Idefics3VisionConfig(**tower(patch_size=4)),
        text_config=hf.LlamaConfig(**text()), image_token_id=IMAGE, pad_token_id=0,
    )  # fmt: skip


def gemma3() -> Any:
    return hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**tower(patch_size=4), vision_use_head=False),
        text_config=hf.Gemma3TextConfig(
            **text(), query_pre_attn_scalar=16, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
        ),
        image_token_index=IMAGE, mm_tokens_per_image=4,
    )  # fmt: skip


def paligemma() -> Any:
    return hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**tower(), vision_use_head=False),
        text_config=hf.GemmaConfig(**text()), image_token_index=OUTSIDE, projection_dim=WIDTH,
    )  # fmt: skip


ONE_SIZE = {"a": (16, 16)}
UNEVEN_TILES = {"a": (16, 32), "b": (30, 20)}
UNEVEN_GRIDS = {"a": (16, 16), "b": (24, 40)}

CASES = {
    "llava": Case(hf.LlavaForConditionalGeneration, llava, same_size, ONE_SIZE),
    "llava_next": Case(hf.LlavaNextForConditionalGeneration, llava_next, anyres, UNEVEN_TILES),
    "llava_onevision": Case(
        hf.LlavaOnevisionForConditionalGeneration, llava_onevision, anyres, UNEVEN_TILES,
        onevision_videos, (3, 16, 16),
    ),
    "qwen2_vl": Case(
        hf.Qwen2VLForConditionalGeneration, qwen2_vl, qwen_images, UNEVEN_GRIDS,
        qwen_videos, (4, 16, 24), types=mm_types,
    ),
    "qwen2_5_vl": Case(
        hf.Qwen2_5_VLForConditionalGeneration, qwen2_5_vl, qwen_images, UNEVEN_GRIDS,
        qwen_videos, (4, 16, 24), types=mm_types,
    ),
    "qwen3_vl": Case(
        hf.Qwen3VLForConditionalGeneration, qwen3_vl, qwen_images, UNEVEN_GRIDS,
        qwen_videos, (4, 16, 24), 2, mm_types,
    ),
    "internvl": Case(
        hf.InternVLForConditionalGeneration, internvl, tiles_as_images,
        {"a": (16, 16), "b": (16, 32)},
    ),
    "smolvlm": Case(
        hf.SmolVLMForConditionalGeneration, smolvlm, images_by_row, {"a": (16, 16), "b": (12, 16)}
    ),
    "idefics3": Case(
        hf.Idefics3ForConditionalGeneration, idefics3, images_by_row, {"a": (16, 16), "b": (16, 8)}
    ),
    "gemma3": Case(
        hf.Gemma3ForConditionalGeneration, gemma3, same_size, ONE_SIZE,
        types=lambda kinds: {"token_type_ids": kinds},
    ),
    "paligemma": Case(
        hf.PaliGemmaForConditionalGeneration, paligemma, same_size, ONE_SIZE,
        types=prefix_and_suffix,
        image_token=OUTSIDE,
    ),
}  # fmt: skip


@cache
def _built(name: str) -> Any:
    torch.manual_seed(0)
    model = CASES[name].model(CASES[name].config()).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.count_nonzero():  # Gemma 3's projection is, as initialised
                parameter.normal_(std=0.1)
    return model


def make_model(name: str) -> Any:
    """The family's model: float32, training, the same on every call."""
    return copy.deepcopy(_built(name))
