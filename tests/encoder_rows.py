# SPDX-License-Identifier: Apache-2.0
"""The vision encoder's row of each visual token, by a hook of its own: what PRe is compared with.

Paths, joins and windows are written down by hand from transformers' code. That each row is what its
token is made of is tested in tests/models/test_anchors.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Source(NamedTuple):
    """The module that reads an encoder's output, and how many of its rows make a token."""

    path: str
    joined: int = 1


_MERGER = Source("model.visual.merger", 4)
_PROJECTOR = Source("model.multi_modal_projector")
_QWENS = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
    "exaone4_5", "cosmos3_omni", "cohere_compass",
)  # fmt: skip
SOURCES = {
    **dict.fromkeys(_QWENS, _MERGER),
    **dict.fromkeys(("internvl", "qianfan_ocr"), _PROJECTOR),
    **dict.fromkeys(("smolvlm", "idefics3"), Source("model.connector.modality_projection")),
    **dict.fromkeys(
        ("gemma3", "shieldgemma2"), Source("model.multi_modal_projector.mm_soft_emb_norm")
    ),
    "t5gemma2": Source("model.encoder.multi_modal_projector.mm_soft_emb_norm"),
    "gemma4": Source("model.embed_vision"),
    "llama4": Source("multi_modal_projector"),
    "mistral3": Source("model.multi_modal_projector.patch_merger.merging_layer"),
    "lighton_ocr": Source("model.vision_projection.patch_merger.merging_layer"),
    "paddleocr_vl": Source("model.projector.linear_1"),
    "aya_vision": Source("model.multi_modal_projector.layernorm"),
    "cohere2_vision": Source("model.multi_modal_projector.linear_1"),
    "kimi_k25": Source("model.mm_projector", 4),
    "muse_glimmer": Source("model.vision_adapter"),
    "cosmos3_edge": Source("model.projector", 4),
}
WINDOWS = ("qwen2_5_vl", "exaone4_5")


@contextmanager
def watching(model: Any, change: Any = None) -> Iterator[list[Tensor]]:
    """The inputs of its source, in the order of the calls: (rows, joined * width) each.

    `change`: gets them, and writes into them.
    """
    source, seen = SOURCES[model.config.model_type], []

    def see(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        [name] = kwargs if not args else [""]
        x = (args or tuple(kwargs.values()))[0].detach().contiguous().clone()
        rows = x.view(-1, source.joined * x.shape[-1])
        if change is not None:
            change(rows, sum(len(part) for part in seen))
        seen.append(rows)
        return ((x, *args[1:]), kwargs) if args else ((), {name: x})

    hook = model.get_submodule(source.path).register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def source_of_tokens(model: Any, inputs: Mapping[str, Any], calls: list[Tensor]) -> Tensor:
    """Which row of all calls each visual token is made of, in the order of `input_ids`."""
    rows = torch.arange(sum(len(rows) for rows in calls))
    if model.config.model_type in WINDOWS:
        visual = model.model.visual
        grids = [inputs[f"{kind}_grid_thw"] for kind in ("image", "video")
                 if inputs.get(f"{kind}_grid_thw") is not None]  # fmt: skip
        rows = rows[window_index(visual, torch.cat(grids)).argsort()]
    if {"pixel_values", "pixel_values_videos"} <= inputs.keys():
        ids, token = inputs["input_ids"], torch.full_like(inputs["input_ids"], -1)
        images, videos = rows.split([len(call) for call in calls])
        token[ids == model.config.image_token_id] = images
        token[ids == model.config.video_token_id] = videos
        return token[token >= 0]
    return rows


def window_index(visual: Any, grids: Tensor) -> Tensor:
    """Of transformers: which token of the images in order each one of the windows is."""
    if hasattr(visual, "get_window_index"):  # before 5
        index: Tensor = visual.get_window_index(grids)[0]
        return index
    from transformers.vision_utils import get_vision_window_index

    sizes = (visual.spatial_merge_size, visual.window_size, visual.patch_size)
    index, _ = get_vision_window_index(grids, *sizes)
    return index


def encoder_rows(model: Any, inputs: Mapping[str, Any], width: int = 0) -> Tensor:
    """(N, A): the source's row of each visual token. `width`: A, for a batch that has none."""
    with torch.no_grad(), watching(model) as calls:
        model(**inputs)
    if not calls:
        return torch.zeros(0, width)
    return torch.cat(calls)[source_of_tokens(model, inputs, calls)]


def tower_rows(model: Any, inputs: Mapping[str, Any], width: int = 16) -> Tensor:
    """The same for LLaVA and others whose projector reads the tower's rows as they are, without
    the class token where the family drops it."""
    if "pixel_values" not in inputs:
        return torch.zeros(0, width)
    with torch.no_grad():
        out = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    if not hasattr(model.config, "vision_feature_layer"):
        return out.last_hidden_state.flatten(0, 1)
    layers = model.config.vision_feature_layer
    rows = torch.cat(
        [out.hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)], dim=2
    )
    whole = model.config.vision_feature_select_strategy == "full"
    return (rows if whole else rows[:, 1:]).flatten(0, 1)
