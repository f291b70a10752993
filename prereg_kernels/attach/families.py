"""What cannot be found on a model: a table of the families of transformers.

An entry says where the anchor "pre_projector" comes from and how a batch tells images apart, and
what a family does otherwise than others. `prereg_kernels.attach.resolver` finds the rest.
"""

from __future__ import annotations

from typing import Any

from prereg_kernels.attach.family import Family

_PROJECTOR = "model.multi_modal_projector"
_MERGES = "merges 2 x 2 patches into a token"
_SHUFFLES = "shuffles several patches into a token"
_TILES = "puts the patches of tiles together again, crops them and adds newlines"

_TOWERS = ("clip_vision_model", "siglip_vision_model")


def _tower_processor(config: Any) -> tuple[str, dict[str, Any]]:
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    if config.vision_config.model_type == "siglip_vision_model":
        return "SiglipImageProcessor", {"size": square}
    return "CLIPImageProcessor", {"size": {"shortest_edge": side}, "crop_size": square}


def _qwen_processor(config: Any) -> tuple[str, dict[str, Any]]:
    vision = config.vision_config
    return "Qwen2VLImageProcessor", {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }


_QWEN_IMAGES: dict[str, Any] = {
    "layout": "blocks",
    "processor": _qwen_processor,
    "markers": ("vision_start_token_id", "vision_end_token_id"),
    "token_types": "mm_token_type_ids",
}

# Where a family has no token for video, frames are images to it.
FAMILIES = (
    Family(
        "LLaVA",
        ("llava",),
        projector=_PROJECTOR,
        images="equal",
        counted_by=("pixel_values",),
        layout="crop",
        towers=_TOWERS,
        processor=_tower_processor,
    ),
    Family(
        "LLaVA-NeXT",
        ("llava_next",),
        regroups=_TILES,
        images="runs",
        counted_by=("image_sizes",),
        layout="tiles",
        towers=_TOWERS,
        processor=_tower_processor,
    ),
    Family(
        "LLaVA-OneVision",
        ("llava_onevision",),
        regroups=_TILES,
        images="runs",
        counted_by=("image_sizes", "pixel_values_videos"),
    ),
    Family(
        "Qwen2-VL",
        ("qwen2_vl",),
        regroups=_MERGES,
        images="runs",
        counted_by=("image_grid_thw", "video_grid_thw"),
        **_QWEN_IMAGES,
    ),
    Family(
        "Qwen2.5-VL",
        ("qwen2_5_vl",),
        regroups=_MERGES,
        images="runs",
        counted_by=("image_grid_thw", "video_grid_thw"),
        **_QWEN_IMAGES,
    ),
    Family(
        "Qwen3-VL",
        ("qwen3_vl",),
        regroups=_MERGES,
        images="runs",
        counted_by=("image_grid_thw",),
        cut_by=("video_grid_thw",),
        **_QWEN_IMAGES,
    ),
    # A batch counts only tiles; its processor writes <img> and </img> around each image's, always.
    Family("InternVL", ("internvl",), regroups=_SHUFFLES, images="runs"),
    # An image is several runs of tokens, one for each of its tiles, and a batch counts only tiles.
    Family(
        "SmolVLM and Idefics3",
        ("smolvlm", "idefics3"),
        regroups=_SHUFFLES,
    ),
    Family(
        "Gemma 3",
        ("gemma3",),
        regroups="averages several patches into a token",
        images="runs",
        starts_at_zero=True,
        counted_by=("pixel_values",),
    ),
    Family(
        "PaliGemma",
        ("paligemma",),
        projector=_PROJECTOR,
        images="equal",
        counted_by=("pixel_values",),
    ),
)


def family_of_type(model_type: str | None) -> Family | None:
    """The family that a `config.model_type` belongs to; None if it is in no entry of the table."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
