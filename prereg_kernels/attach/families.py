"""What cannot be found on a model: a table of the families of transformers.

An entry says where the anchor "pre_projector" comes from and how a batch tells images apart, and
what a family does otherwise than others. `prereg_kernels.attach.resolver` finds the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.attach.family import Family

_PROJECTOR = "model.multi_modal_projector"
_MERGES = "merges 2 x 2 patches into a token"
_SHUFFLES = "shuffles several patches into a token"
_TILES = "puts the patches of tiles together again, crops them and adds newlines"

_CROSS_ATTENTION = (
    "its decoder sees the picture by cross-attention, so no visual token enters it, and there are "
    "no hidden states to regularise"
)

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


def _first_stream(states: Tensor, width: int) -> Tensor:
    """Of (streams, rows, length, D)."""
    return states[0]


def _mean_of_streams(states: Tensor, width: int) -> Tensor:
    """Of (rows, length, streams, D)."""
    return states.mean(dim=-2)


def _mean_of_joined_streams(states: Tensor, width: int) -> Tensor:
    """Of (rows, length, streams * D)."""
    return states.unflatten(-1, (-1, width)).mean(dim=-2)


def _mask_of_kosmos(batch: Mapping[str, Any]) -> Tensor:
    """Its ids of an image's tokens are words like others."""
    mask = batch.get("image_embeds_position_mask")
    return torch.zeros_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _codes_of(prefix: str) -> Callable[[Any], list[int]]:
    """The ids of the words that begin so."""

    def codes(config: Any) -> list[int]:
        return [id for word, id in config.vocabulary_map.items() if word.startswith(prefix)]

    return codes


def _first_of_granite(config: Any) -> int:
    """Its features go to several layers, the first of them before all others."""
    layers = [layer for _, layer in config.deepstack_layer_map or ()]
    return min(*layers, *config.spatial_target_layers)


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
    # Features that are merged elsewhere than in inputs_embeds, or added at several layers.
    Family("Granite 4 Vision", ("granite4_vision",), regroups=_TILES, enters_at=_first_of_granite),
    Family("Phi-4-multimodal", ("phi4_multimodal",), enters_at=0),
    Family("Chameleon", ("chameleon",), enters_at=0, codes=_codes_of("IMGIMG")),
    Family("Emu3", ("emu3",), codes=_codes_of("<|visual token")),
    Family("Kosmos-2", ("kosmos-2",), visual_mask=_mask_of_kosmos, enters_at=0),
    # Several residual streams. AltUp's first one is what the next layers read and the head sees;
    # of hyper-connections the mean is, as the final norm reads it.
    Family(
        "Gemma 3n",
        ("gemma3n",),
        streams=_first_stream,
        other_tokens=("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id"),
    ),
    Family("GLM-5-Next", ("glm5_next",), streams=_mean_of_streams),
    Family("Qwen4", ("qwen4_exp",), streams=_mean_of_joined_streams),
    Family("Ovis 2", ("ovis2",), other_tokens=("visual_indicator_token_ids",)),
    # Its decoder norms the rows of its table.
    Family("Inkling", ("inkling_mm_model",)),
    # No visual token enters the decoder.
    Family("Llama 3.2 Vision", ("mllama",), refused=_CROSS_ATTENTION),
    Family("IDEFICS", ("idefics",), refused=_CROSS_ATTENTION),
)


def family_of_type(model_type: str | None) -> Family | None:
    """The family that a `config.model_type` belongs to; None if it is in no entry of the table."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
