# SPDX-License-Identifier: Apache-2.0
"""The table of transformers' families, with what cannot be found on a model.

An entry says where the anchor "pre_projector" comes from, how a batch tells images apart, and what
sets the family apart from others. `prereg_kernels.attach.resolver` finds the rest on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.attach.family import Family
from prereg_kernels.attach.visual import hide

_PROJECTOR = "model.multi_modal_projector"
# A merger reads an image's patches block by block, those of a token one after another.
_MERGER: dict[str, Any] = {"projector": "model.visual.merger", "joins_rows": True}
_CONVOLVES = "convolves several patches into a token"
_MOVES = "has its merger in another place from transformers 5.24 on"
_RESAMPLES = "resamples an image to a fixed number of tokens"
_TILES = "puts the patches of tiles together again, crops them and adds newlines"
_CODES = "turns an image into tokens of the vocabulary"
_NO_ENCODER = "has no vision encoder"

# How a batch counts its images.
_EQUAL: dict[str, Any] = {"images": "equal", "counted_by": ("pixel_values",)}
_RUNS: dict[str, Any] = {"images": "runs"}
_PIXELS: dict[str, Any] = {**_RUNS, "counted_by": ("pixel_values",)}
_SIZES: dict[str, Any] = {**_RUNS, "counted_by": ("image_sizes",)}
_CLIPS: dict[str, Any] = {**_RUNS, "counted_by": ("image_sizes", "pixel_values_videos")}
_GRIDS: dict[str, Any] = {**_RUNS, "counted_by": ("image_grid_thw",)}
# A video is one run of tokens, or its grids are those of its runs;
_GRIDS_OF_RUNS: dict[str, Any] = {**_RUNS, "counted_by": ("image_grid_thw", "video_grid_thw")}
# or a timestamp stands between its frames.
_GRIDS_OF_FRAMES: dict[str, Any] = {**_GRIDS, "cut_by": ("video_grid_thw",)}

# Why no visual token enters a decoder.
_CROSS_ATTENTION = "its decoder reads images by cross-attention, so no visual token enters it"
_NO_POSITIONS = "it puts an image's rows beside the text, at no position of input_ids"
_THINKER = (
    "it is a shell, and the part of it that is trained is its thinker; call "
    "apply_pre(model.thinker)"
)

_TOWERS = ("clip_vision_model", "siglip_vision_model")


def _tower_processor(config: Any) -> tuple[str, dict[str, Any]]:
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    if config.vision_config.model_type == "siglip_vision_model":
        return "SiglipImageProcessor", {"size": square}
    return "CLIPImageProcessor", {"size": {"shortest_edge": side}, "crop_size": square}


def _tiles_processor(config: Any) -> tuple[str, dict[str, Any]]:
    _, settings = _tower_processor(config)
    return "LlavaNextImageProcessor", {
        "size": {"shortest_edge": config.vision_config.image_size},
        "crop_size": settings.get("crop_size", settings["size"]),
        "image_grid_pinpoints": config.image_grid_pinpoints,
    }


def _qwen_processor(config: Any) -> tuple[str, dict[str, Any]]:
    vision = config.vision_config
    return "Qwen2VLImageProcessor", {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 12_845_056},
    }


def _qwen3_processor(config: Any) -> tuple[str, dict[str, Any]]:
    name, settings = _qwen_processor(config)
    return name, {
        **settings,
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


# Processors are as in the families' releases: transformers' defaults are other ones
_QWEN_IMAGES: dict[str, Any] = {
    "layout": "blocks",
    "processor": _qwen_processor,
    "markers": ("vision_start_token_id", "vision_end_token_id"),
    "token_types": "mm_token_type_ids",
}
_QWEN3_IMAGES: dict[str, Any] = {**_QWEN_IMAGES, "processor": _qwen3_processor}


def _places_of_windows(config: Any, batch: Mapping[str, Any]) -> Tensor:
    """The place of each token of an encoder that reads it window by window, as Qwen2.5-VL's."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    side = vision.window_size // merge // vision.patch_size
    places, start = [], 0
    for name in ("image_grid_thw", "video_grid_thw"):
        for t, h, w in () if batch.get(name) is None else batch[name].tolist():
            frames, rows, columns = torch.meshgrid(
                *(torch.arange(n) for n in (t, h // merge, w // merge)), indexing="ij"
            )
            windows = (frames * (h + side) + rows // side) * (w + side) + columns // side
            # Stable: within a window row by row, as in the image
            places.append(windows.flatten().argsort(stable=True) + start)
            start += windows.numel()
    return torch.cat(places)


def _first_stream(states: Tensor, width: int) -> Tensor:
    """The first stream of states that are (streams, rows, length, D)."""
    return states[0]


def _mean_of_streams(states: Tensor, width: int) -> Tensor:
    """The mean of the streams of states that are (rows, length, streams, D)."""
    return states.mean(dim=-2)


def _mean_of_joined_streams(states: Tensor, width: int) -> Tensor:
    """The same for states that are (rows, length, streams * D)."""
    return states.unflatten(-1, (-1, width)).mean(dim=-2)


def _mask_of_kosmos(batch: Mapping[str, Any]) -> Tensor:
    """The ids of Kosmos-2's image tokens are ordinary words, so its batch has a mask."""
    mask, ids = batch.get("image_embeds_position_mask"), batch.get("input_ids")
    if mask is None:
        like = batch["inputs_embeds"][..., 0] if ids is None else ids
        return torch.zeros_like(like, dtype=torch.bool)
    return hide(mask == 1, batch.get("attention_mask"))


def _codes_of(prefix: str) -> Callable[[Any], list[int]]:
    """A function from the config to the ids of the words that begin with this prefix."""

    def codes(config: Any) -> list[int]:
        return [id for word, id in config.vocabulary_map.items() if word.startswith(prefix)]

    return codes


def _first_of_granite(config: Any) -> int:
    """The first of the layers that get features of Granite 4 Vision's encoder."""
    layers = [layer for _, layer in config.deepstack_layer_map or ()]
    return min(*layers, *config.spatial_target_layers)


# Where a family has no token for video, frames are images to it.
FAMILIES = (
    # Rows of the encoder, one a token, all images of equally many tokens.
    Family(
        "LLaVA", ("llava",), projector=_PROJECTOR, **_EQUAL,
        layout="crop", towers=_TOWERS, processor=_tower_processor,
    ),
    Family("PaliGemma", ("paligemma",), projector=_PROJECTOR, **_EQUAL),
    Family("VipLLaVA", ("vipllava",), projector=_PROJECTOR, **_EQUAL),
    Family("FastVLM", ("fast_vlm",), projector=_PROJECTOR, **_EQUAL),
    # Of the hybrid, the rows of the encoder of small images alone.
    Family(
        "DeepSeek-VL", ("deepseek_vl", "deepseek_vl_hybrid"), projector="model.aligner", **_EQUAL
    ),
    # Its processor writes tokens around each image, always.
    Family("Janus", ("janus",), projector="model.aligner", **_PIXELS),
    # Tiles that are put together again: one run of tokens an image.
    Family(
        "LLaVA-NeXT", ("llava_next",), regroups=_TILES, **_SIZES,
        layout="tiles", towers=_TOWERS, processor=_tiles_processor,
    ),
    Family("LLaVA-OneVision", ("llava_onevision",), regroups=_TILES, **_CLIPS),
    Family("LLaVA-NeXT-Video", ("llava_next_video",), regroups=_TILES, **_CLIPS),
    Family(
        "Granite 4 Vision", ("granite4_vision",), enters_at=_first_of_granite, **_SIZES,
        regroups="adds several projections of an image, at several layers",
    ),
    Family("Phi-4-multimodal", ("phi4_multimodal",), enters_at=0, regroups=_TILES, **_SIZES),
    # A video is one run.
    Family("Qwen2-VL", ("qwen2_vl",), **_MERGER, **_GRIDS_OF_RUNS, **_QWEN_IMAGES),
    Family(
        "Qwen2.5-VL", ("qwen2_5_vl",), **_MERGER, places=_places_of_windows, **_GRIDS_OF_RUNS,
        **_QWEN_IMAGES,
    ),
    # The audio of a video cuts it into many runs, and the count says so.
    Family("Qwen2.5-Omni", ("qwen2_5_omni_thinker",), regroups=_MOVES, **_GRIDS_OF_RUNS),
    Family("Qwen3-Omni", ("qwen3_omni_moe_thinker",), regroups=_MOVES, **_GRIDS_OF_RUNS),
    Family(
        "EXAONE 4.5", ("exaone4_5",), **_MERGER, places=_places_of_windows, **_GRIDS_OF_RUNS
    ),
    Family(
        "Ernie 4.5 VL", ("ernie4_5_vl_moe",), **_GRIDS_OF_RUNS,
        regroups="merges patches, and frames after that",
    ),
    # Of a video, a grid for each chunk, with a timestamp before it.
    Family(
        "Kimi K2.5", ("kimi_k25",), projector="model.mm_projector", joins_rows=True,
        **_GRIDS_OF_RUNS,
    ),
    # A video is a run for each frame, or pair of frames.
    Family("Qwen3-VL", ("qwen3_vl",), **_MERGER, **_GRIDS_OF_FRAMES, **_QWEN3_IMAGES),
    Family("Qwen3-VL-MoE", ("qwen3_vl_moe",), **_MERGER, **_GRIDS_OF_FRAMES),
    Family("Qwen3.5", ("qwen3_5", "qwen3_5_moe"), **_MERGER, **_GRIDS_OF_FRAMES),
    # Hyper-connections: streams that a learned mixture ends. Their mean is nearest to it.
    Family(
        "Qwen4", ("qwen4_exp",), streams=_mean_of_joined_streams, **_MERGER,
        **_GRIDS_OF_FRAMES,
    ),
    Family("Cosmos 3", ("cosmos3_omni",), **_MERGER, **_GRIDS_OF_FRAMES),
    Family(
        "Cosmos 3 Edge", ("cosmos3_edge",), projector="model.projector", joins_rows=True,
        **_GRIDS_OF_FRAMES,
    ),
    Family("Cohere Compass", ("cohere_compass",), **_MERGER, **_GRIDS_OF_FRAMES),
    # The frames of a video are at the id of images.
    Family(
        "GLM-V", ("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"), regroups=_CONVOLVES,
        **_GRIDS_OF_FRAMES,
    ),
    # Hyper-connections: the final norm reads the mean of the streams.
    Family(
        "GLM-5-Next", ("glm5_next",), streams=_mean_of_streams, regroups=_CONVOLVES,
        **_GRIDS_OF_FRAMES,
    ),
    Family(
        "MiniMax M3 VL", ("minimax_m3_vl",), regroups="projects patches before it merges them",
        **_GRIDS_OF_FRAMES,
    ),
    Family(
        "Muse Glimmer", ("muse_glimmer",), projector="model.vision_adapter", **_GRIDS_OF_FRAMES
    ),
    Family(
        "VideoLLaMA 3", ("video_llama_3",), **_GRIDS_OF_FRAMES,
        regroups="interpolates patches and leaves out those of a video that hardly change",
    ),
    # Images alone.
    Family("PaddleOCR-VL", ("paddleocr_vl",), projector="model.projector.linear_1", **_GRIDS),
    Family(
        "HunYuan-VL", ("hunyuan_vl",), **_GRIDS,
        regroups="merges several patches into a token and adds newlines, a begin and an end",
    ),
    Family(
        "LightOnOCR", ("lighton_ocr",),
        projector="model.vision_projection.patch_merger.merging_layer", **_SIZES,
    ),
    Family("Emu3", ("emu3",), codes=_codes_of("<|visual token"), regroups=_CODES, **_SIZES),
    Family(
        "Chameleon", ("chameleon",), enters_at=0, codes=_codes_of("IMGIMG"), regroups=_CODES,
        **_PIXELS,
    ),
    Family(
        "Gemma 3", ("gemma3", "shieldgemma2"), starts_at_zero=True,
        projector=f"{_PROJECTOR}.mm_soft_emb_norm", **_PIXELS,
    ),
    Family(
        "T5Gemma 2", ("t5gemma2",), starts_at_zero=True,
        projector="model.encoder.multi_modal_projector.mm_soft_emb_norm", **_PIXELS,
    ),
    # AltUp: the first stream is the one that attention and MLPs read, and the others predict. The
    # tokens around images and sounds have rows in the towers' own tables.
    Family(
        "Gemma 3n", ("gemma3n",), streams=_first_stream,
        other_tokens=("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id"),
        regroups="embeds text with its projector, too", **_PIXELS,
    ),
    Family(
        "DeepSeek-OCR 2", ("deepseek_ocr2",), **_PIXELS,
        regroups="puts the tiles of an image before the whole of it and adds a separator",
    ),
    Family(
        "Florence-2", ("florence2",), regroups="puts the mean of all patches before them", **_PIXELS
    ),
    Family("BLIP-2", ("blip-2",), regroups=_RESAMPLES, **_PIXELS),
    Family(
        "InstructBLIP", ("instructblip", "instructblipvideo"), regroups=_RESAMPLES, **_PIXELS
    ),
    # Where it splits images, their crops are counted, and an error says so.
    Family("Aria", ("aria",), regroups=_RESAMPLES, **_PIXELS),
    Family(
        "Kosmos-2", ("kosmos-2",), visual_mask=_mask_of_kosmos, enters_at=0, regroups=_RESAMPLES,
        **_EQUAL,
    ),
    Family(
        "Kosmos-2.5", ("kosmos-2.5",), visual_mask=_mask_of_kosmos, enters_at=0,
        regroups=_RESAMPLES, images="equal", counted_by=("flattened_patches",),
    ),
    Family(
        "Video-LLaVA", ("video_llava",), regroups="projects images and videos apart", **_RUNS,
        counted_by=("pixel_values_images", "pixel_values_videos"),
    ),
    Family(
        "Perception LM", ("perception_lm",), **_RUNS,
        regroups="averages patches that it has projected",
        counted_by=("pixel_values", "pixel_values_videos"),
    ),
    # A batch counts only tiles, patches or padded frames; tokens stand around each image, always.
    Family("InternVL", ("internvl",), projector=_PROJECTOR, **_RUNS),
    Family("Qianfan-OCR", ("qianfan_ocr",), projector=_PROJECTOR, **_RUNS),
    Family("Gemma 4", ("gemma4",), projector="model.embed_vision", **_RUNS),
    Family("Gemma 4 Unified", ("gemma4_unified",), regroups=_NO_ENCODER, **_RUNS),
    # An image is several runs of tokens, one for each of its tiles or rows.
    # Where the projector itself shuffles or averages patches, its part after that has the rows.
    Family(
        "SmolVLM and Idefics3", ("smolvlm", "idefics3"),
        projector="model.connector.modality_projection",
    ),
    Family("Aya Vision", ("aya_vision",), projector=f"{_PROJECTOR}.layernorm"),
    Family("Cohere 2 Vision", ("cohere2_vision",), projector=f"{_PROJECTOR}.linear_1"),
    Family("Llama 4", ("llama4",), projector="multi_modal_projector"),  # after the encoder's own
    Family(
        "LFM2-VL", ("lfm2_vl", "lfm2-vl"),
        regroups="pads images to one size from transformers 5.24 on",
    ),
    Family("Mistral 3", ("mistral3",), projector=f"{_PROJECTOR}.patch_merger.merging_layer"),
    Family("MiniCPM-V 4.6", ("minicpmv4_6",), regroups="merges patches in several rounds"),
    Family(
        "Step 3.7", ("step3p7",), regroups="puts the tiles of an image before the whole of it"
    ),
    Family("Idefics2", ("idefics2",), regroups=_RESAMPLES),
    Family(
        "Ovis 2", ("ovis2",), other_tokens=("visual_indicator_token_ids",),
        regroups="mixes rows of a visual vocabulary",
    ),
    Family("Fuyu", ("fuyu",), regroups=_NO_ENCODER),
    # Nothing stands between two images but what the text says, and a batch counts only patches.
    # Its decoder norms the rows of its table, and so nothing is seen of where features are.
    Family("Inkling", ("inkling_mm_model",), regroups="has no projector"),
    Family(
        "GOT-OCR 2", ("got_ocr2", "pp_chart2table"), regroups=_CONVOLVES
    ),
    # What PRe cannot regularise.
    Family("Llama 3.2 Vision", ("mllama",), refused=_CROSS_ATTENTION),
    Family("IDEFICS", ("idefics",), refused=_CROSS_ATTENTION),
    Family("BLIP", ("blip",), refused=_CROSS_ATTENTION),
    Family("Pix2Struct", ("pix2struct",), refused=_CROSS_ATTENTION),
    Family("PP-FormulaNet", ("pp_formulanet",), refused=_CROSS_ATTENTION),
    Family("vision-encoder-decoder", ("vision-encoder-decoder",), refused=_CROSS_ATTENTION),
    Family("GIT", ("git",), refused=_NO_POSITIONS),
    Family("UDOP", ("udop",), refused=_NO_POSITIONS),
    Family("Evolla", ("evolla",), refused="it reads proteins, not images"),
    Family("Mistral 4", ("mistral4",), refused="it reads text alone"),
    Family("pi0", ("pi0",), refused="it learns actions, and has no loss of text"),
    Family(
        "DiffusionGemma", ("diffusion_gemma",),
        refused="its forward has no loss, and its decoder reads images by its encoder's cache",
    ),
    Family("Qwen2.5-Omni", ("qwen2_5_omni",), refused=_THINKER),
    Family("Qwen3-Omni", ("qwen3_omni_moe",), refused=_THINKER),
)  # fmt: skip


def family_of_type(model_type: str | None) -> Family | None:
    """The family that a `config.model_type` belongs to; None if it is in no entry of the table."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
