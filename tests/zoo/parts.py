# SPDX-License-Identifier: Apache-2.0
"""What the cases are built of: shrunk configs, models with random weights, and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.attach.families.models import (
    IMAGE,
    LAYERS,
    NEW,
    VIDEO,
    WIDTH,
    Inputs,
    as_released,
)
from tests.zoo.sample import Batch

# Classes that releases before 5 have, and do not list: of parts of others,
UNLISTED = {
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
# or in other mappings.
CLASSES = {
    **UNLISTED,
    "instructblipvideo": "InstructBlipVideoForConditionalGeneration",
    "lfm2-vl": "Lfm2VlForConditionalGeneration",  # which its config is called there
    "video_llava": "VideoLlavaForConditionalGeneration",
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),
}
VOCABULARY = 64  # words are 3 to 39, 51 and above are free for what a type needs
AUDIO, AUDIO_START, AUDIO_END = 43, 44, 45
VIDEO_START, VIDEO_END = 46, 47  # where they are not NEW

# Sizes of a config and of its parts, by attribute: those that a config has are set.
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY,
    "max_position_embeddings": 512, "initializer_range": 0.2, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "sliding_window": 8, "num_nextn_predict_layers": 0,
    # Experts
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "shared_expert_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    # Linear and latent attention
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_conv_kernel_dim": 2, "kv_lora_rank": 8,
    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    **SPECIAL_TOKENS,
}  # fmt: skip
VISION = {
    "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2, "depth": 2,
    "num_attention_heads": 2, "num_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "image_size": 16, "patch_size": 4, "in_channels": 3, "num_patches": 16,
    "num_position_embeddings": 16, "window_size": 8, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": WIDTH, "text_hidden_size": WIDTH,
    "projection_dim": WIDTH, "vision_use_head": False, "initializer_range": 0.2,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
TOP = {
    "hidden_size": WIDTH, "vocab_size": VOCABULARY, "projector_hidden_size": WIDTH,
    "projection_hidden_size": WIDTH, **SPECIAL_TOKENS,
    **{f"{kind}_token_{end}": token for kind, token in
        (("image", IMAGE), ("video", VIDEO), ("audio", AUDIO)) for end in ("id", "index")},
    **{f"{start}_token_id": NEW for start in
        ("vision_start", "vision_end", "image_start", "image_end", "video_start", "video_end",
         "boi", "eoi", "boa", "eoa", "audio_start", "audio_end")},
    "boi_token_index": NEW, "eoi_token_index": NEW, "eoa_token_index": NEW,
}  # fmt: skip
# What configs derive from the sizes, or from each other.
DERIVED = {
    "layer_types", "mlp_layer_types", "per_layer_config", "moe_layers", "no_rope_layers",
    "indexer_types", "full_attn_idxs", "layer_rope_theta", "partial_rotary_factor", "qk_head_dim",
    "merged_hidden_size", "id2label", "label2id", "num_classes", "label_names",
    "transformers_version",
}  # fmt: skip


def shrunk(values: Mapping[str, Any], sizes: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A config's values, those of `sizes` in place of the ones that it sets, and `more`."""
    values = {name: value for name, value in values.items() if name not in DERIVED}
    set_here = {name for name, value in values.items() if value is not None} | {"pad_token_id"}
    return values | {n: sizes[n] for n in sizes if n in values and n in set_here} | more


def config_class(model_type: str) -> Any:
    if model_type not in CONFIG_MAPPING and model_type in UNLISTED:
        return getattr(hf, UNLISTED[model_type]).config_class
    return CONFIG_MAPPING[model_type]


def defaults(model_type: str) -> dict[str, Any]:
    values = config_class(model_type)().to_dict()
    return values | {"model_type": model_type}


def text_part(model_type: str, **more: Any) -> dict[str, Any]:
    """A shrunk `text_config` of a language model's type."""
    return shrunk(defaults(model_type), TEXT, **more)


def tiny_config(
    model_type: str,
    *,
    text: Mapping[str, Any] = {},
    vision: Mapping[str, Any] = {},
    top: Mapping[str, Any] = {},
    **parts: Mapping[str, Any],
) -> Any:
    """The type's config, shrunk: `text`, `vision` and `top` say what else differs from the default.

    So do `parts`, by name, of parts like `qformer_config`.
    """
    values = defaults(model_type)
    del values["model_type"]
    inner = {n for n, value in values.items() if isinstance(value, dict) and "config" in n}
    more = {"text_config": text, "vision_config": vision, **parts}
    sizes = {"vision_config": VISION}
    config = shrunk({n: values[n] for n in values if n not in inner}, TOP)
    for name in inner:
        config[name] = shrunk(values[name], sizes.get(name, TEXT), **more.get(name, {}))
    rotary = config.get("text_config", {}).get("rope_parameters")
    if isinstance(rotary, dict) and "rope_parameters" not in text and "mrope_section" in rotary:
        rotary["mrope_section"] = [2, 3, 3]
    whole = {n: as_released(x) if n in inner else x for n, x in (config | dict(top)).items()}
    return config_class(model_type)(**as_released(whole))


def mrope(*section: int, **more: Any) -> dict[str, Any]:
    """`rope_parameters` of positions in three dimensions."""
    return {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more
    }  # fmt: skip


def tiny_model(config: Any, name: str | None = None) -> Any:
    """The model of the config, or the class of that name: float32, training, the same each time."""
    name = name or CLASSES[config.model_type]
    torch.manual_seed(0)
    model = getattr(hf, name)(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # Some types begin with zeros or with unset memory where a checkpoint has weights.
            if not parameter.count_nonzero() or not parameter.isfinite().all():
                parameter.normal_(std=0.1)
    return model


class Media(NamedTuple):
    """Images, videos or audio clips.

    Attributes:
        kind: 1 images, 2 videos, 3 audio clips.
        token: the id whose positions take features.
        runs: the lengths of the runs of `token`, for each image, video or clip.
        inputs: the arguments of the model's forward, all images, videos or clips together.
        around: the ids before and behind each one.
        between: the ids between its runs.
    """

    kind: int
    token: int
    runs: Sequence[Sequence[int]]
    inputs: Inputs
    around: tuple[Sequence[int], Sequence[int]] = ((NEW,), (NEW,))
    between: Sequence[int] = (NEW,)

    def ids(self, number: int) -> list[int]:
        """What stands in a sequence for one of them."""
        before, behind = self.around
        first, *others = self.runs[number]
        rest = [t for run in others for t in (*self.between, *[self.token] * run)]
        return [*before, *[self.token] * first, *rest, *behind]


def images(*counts: int, **inputs: Any) -> Media:
    """Images of so many tokens each."""
    return Media(1, IMAGE, [(count,) for count in counts], inputs)


def videos(*runs: Sequence[int], **inputs: Any) -> Media:
    """Videos: the tokens of each one's runs."""
    return Media(2, VIDEO, runs, inputs)


def audio(*counts: int, **inputs: Any) -> Media:
    """Audio clips of so many tokens each."""
    return Media(3, AUDIO, [(n,) for n in counts], inputs, ((AUDIO_START,), (AUDIO_END,)))


Types = Callable[[Tensor], Inputs]  # arguments by a tensor of kinds: 1 images, 2 videos, 3 audio


def no_types(kinds: Tensor) -> Inputs:
    return {}


def mm_types(kinds: Tensor) -> Inputs:
    return {"mm_token_type_ids": kinds}


def make_batches(
    images: Media | None = None,
    videos: Media | None = None,
    audio: Media | None = None,
    *,
    types: Types = no_types,
    text_only: bool = True,
    together: bool = True,
    merged: bool = True,
    decoder_labels: bool = False,
) -> dict[str, Batch]:
    """The scenes that can be made of these.

    Args:
        types: further arguments that follow the ids.
        text_only: whether a batch may be without.
        together: whether a batch may have images and videos.
        merged: whether features take the place of tokens.
        decoder_labels: whether the labels are a text of their own: the model is an encoder-decoder.
    """
    scenes: dict[str, list[Media]] = {"text only": []} if text_only else {}
    if images:
        scenes["images"] = [images]
    if videos:
        scenes["videos"] = [videos]
    several = [media for media in (images, videos, audio) if media]
    if len(several) > 1 and together:
        scenes["mixed"] = several
    return {scene: _batch(media, types, merged, decoder_labels) for scene, media in scenes.items()}


def _batch(media: Sequence[Media], types: Types, merged: bool, decoder_labels: bool) -> Batch:
    input_ids, kinds, attention_mask = sequences(media)
    labels = input_ids.where((attention_mask == 1) & (kinds == 0), -100)
    if decoder_labels:
        labels = torch.tensor([[5, 31, 17, 8, 23, 2], [12, 6, 2, -100, -100, -100]])
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    for medium in media:
        inputs |= medium.inputs
    visual = (kinds == 1) | (kinds == 2) if merged else torch.zeros_like(kinds, dtype=torch.bool)
    return Batch(inputs | types(kinds), visual)


def sequences(media: Sequence[Media]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, kinds and attention mask of two rows, padded on the right.

    The first row has the larger half of the images, of the videos and of the clips.
    """
    generator = torch.Generator().manual_seed(3)
    words = iter(torch.randint(3, 40, (64,), generator=generator).tolist())
    rows: list[list[int]] = [[1, next(words)], [1, next(words)]]
    kinds: list[list[int]] = [[0, 0], [0, 0]]
    for medium in media:
        for number in range(len(medium.runs)):
            row = int(number >= len(medium.runs) / 2)
            ids = [*medium.ids(number), next(words)]
            rows[row] += ids
            kinds[row] += [medium.kind * (token == medium.token) for token in ids]
    for row, count in enumerate((7, 5)):
        rows[row] += [next(words) for _ in range(count)]
        kinds[row] += [0] * count

    def pad(lists: Sequence[Sequence[int]]) -> Tensor:
        return pad_sequence([torch.tensor(x) for x in lists], batch_first=True)

    return pad(rows), pad(kinds), pad([[1] * len(row) for row in rows])
