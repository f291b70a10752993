"""Types whose images are patches in a row, with a grid each, as Qwen2-VL's are."""

from __future__ import annotations

from typing import Any

from tests.attach.families.models import qwen_patches
from tests.zoo.parts import (
    Types,
    images,
    make_batches,
    mm_types,
    mrope,
    tiny_config,
    tiny_model,
    videos,
)
from tests.zoo.sample import Sample, case

IMAGES = ((1, 16, 16), (1, 16, 24), (1, 24, 16))  # frames, height, width
VIDEOS = ((4, 16, 24), (2, 16, 16))
# Each pair of frames is a run of tokens of its own, behind a time stamp.
STAMPED = ((6, 6), (4,))
WHOLE = ((12,), (4,))

INTERLEAVED = {"rope_parameters": mrope(4, 2, 2, mrope_interleaved=True)}


def qwen(config: Any, runs: Any, types: Types = mm_types) -> Sample:
    pixels, grids = qwen_patches(IMAGES)
    frames, frame_grids = qwen_patches(VIDEOS)
    batches = make_batches(
        images(4, 6, 6, pixel_values=pixels, image_grid_thw=grids),
        videos(*runs, pixel_values_videos=frames, video_grid_thw=frame_grids),
        types=types,
    )
    return Sample(tiny_model(config), batches)


@case("qwen3_vl_moe")
def qwen3_vl_moe() -> Sample:
    config = tiny_config(
        "qwen3_vl_moe", text=INTERLEAVED, vision={"deepstack_visual_indexes": [0, 1]}
    )
    return qwen(config, STAMPED)


def hybrid() -> dict[str, Any]:
    """Every second layer with linear attention."""
    return {
        "rope_parameters": mrope(2, 3, 3, mrope_interleaved=True, partial_rotary_factor=1.0),
        "layer_types": ["linear_attention", "full_attention"] * 2,
    }


@case("qwen3_5")
def qwen3_5() -> Sample:
    return qwen(tiny_config("qwen3_5", text=hybrid()), STAMPED)


@case("qwen3_5_moe")
def qwen3_5_moe() -> Sample:
    return qwen(tiny_config("qwen3_5_moe", text=hybrid()), STAMPED)
