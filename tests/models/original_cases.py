# SPDX-License-Identifier: Apache-2.0
"""Batches for the models of `tests.models.originals`, and where these keep what PRe reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, Qwen2Config

from tests.attached import Place
from tests.models import originals, originals_inside
from tests.models.originals import LIMIT, PATCHES, SIZES

START, END, IMAGE = 36, 37, 38  # the words are below
Row = Sequence[int | None]
SCENES: dict[str, tuple[Row, Row]] = {  # None: an image
    "several images": ((5, None, 7, 8, None, 9, 11, 12), (3, 4, None, 6)),
    "some text": ((3, None, 5, 6, 7), (8, 9, 10, 11, 12, 13, 14)),
    "text only": ((3, 4, 5, 6, 7), (8, 9, 10)),
}


class Batch(NamedTuple):
    """Keyword arguments of the model's forward, and where its decoder gets visual features."""

    inputs: dict[str, Any]
    visual: Tensor


class Tokens(NamedTuple):
    """(rows, length) each, padded: `visual` by the number of positions that an id stands for."""

    ids: Tensor
    labels: Tensor
    attention: Tensor
    visual: Tensor
    rows: list[list[int]]


def tokens(
    scene: str, image: Callable[[int], Sequence[int]], side: str, marks: Mapping[int, int]
) -> Tokens:
    """Of a scene's rows.

    Args:
        image: the ids of the scene's image of that number. side: of the padding.
        marks: {id: so many visual positions in its place}.
    """
    number, rows = 0, []
    for row in SCENES[scene]:
        rows.append([])
        for word in row:
            rows[-1] += image(number) if word is None else [word]
            number += word is None
    flags = [[flag for i in row for flag in [i in marks] * marks.get(i, 1)] for row in rows]
    labels = [[i if 0 < i < START else -100 for i in row] for row in rows]

    def padded(lists: Any, fill: Any) -> Tensor:
        parts = [torch.tensor(x) for x in lists]
        return pad_sequence(parts, batch_first=True, padding_value=fill, padding_side=side)

    shown = padded([[1] * len(row) for row in rows], 0)
    return Tokens(padded(rows, 0), padded(labels, -100), shown, padded(flags, False), rows)


def pictures(scene: str) -> list[Tensor]:
    """(n, 3, 16, 16) for each row."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(row.count(None), 3, 16, 16, generator=generator) for row in SCENES[scene]]


def with_dummies(images: list[Tensor]) -> list[Tensor]:
    """A row of text has one, too."""
    return [x if len(x) else torch.zeros(1, 3, 16, 16) for x in images]


def internvl_chat(scene: str, side: str, model: Any) -> Batch:
    t = tokens(scene, lambda _: [START, *[IMAGE] * PATCHES, END], side, {IMAGE: 1})
    images = pictures(scene)
    flags = torch.tensor([int(len(x) > 0) for x in images for _ in range(max(1, len(x)))])
    inputs = {
        "pixel_values": torch.cat(with_dummies(images)), "input_ids": t.ids,
        "attention_mask": t.attention, "image_flags": flags[:, None], "labels": t.labels,
    }  # fmt: skip
    return Batch(inputs, t.visual)


def minicpm_v(scene: str, side: str, model: Any) -> Batch:
    t = tokens(scene, lambda _: [START, *[IMAGE] * PATCHES, END], side, {IMAGE: 1})
    begins = [(row == START).nonzero().flatten() + 1 for row in t.ids]
    data = {
        "input_ids": t.ids, "position_ids": torch.arange(t.ids.shape[1])[None],
        "pixel_values": [list(x) for x in pictures(scene)],
        "image_bound": [torch.stack([x, x + PATCHES], dim=1) if len(x) else [] for x in begins],
    }  # fmt: skip
    return Batch({"data": data, "labels": t.labels}, t.visual)


def deepseek_vl2(scene: str, side: str, model: Any) -> Batch:
    """The first image has two tiles, the others one; all of them have a view of the whole."""
    t = tokens(scene, lambda n: [IMAGE] * (6 + 1 + 6 * (2 if n == 0 else 1)), side, {IMAGE: 1})
    counts = [x.shape[0] for x in pictures(scene)]
    crops = torch.zeros(2, 2, 2, dtype=torch.long)
    for row, count in enumerate(counts):
        crops[row, :count] = 1
    if any(counts):
        crops[0, 0, 0] = 2
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": t.ids, "attention_mask": t.attention, "labels": t.labels,
        "images": torch.randn(2, 5, 3, 16, 16, generator=generator),
        "images_seq_mask": t.ids == IMAGE, "images_spatial_crop": crops,
    }  # fmt: skip
    return Batch(inputs, t.visual)


def ovis(scene: str, side: str, model: Any) -> Batch:
    """Padding is a part of the row that images expand."""
    t = tokens(scene, lambda _: [-301, -300, -302], side, {-300: PATCHES})
    flags = [[f for i in row for f in [i == -300] * (4 if i == -300 else 1)] for row in t.ids]
    visual = torch.zeros(len(flags), LIMIT, dtype=torch.bool)
    for row, flag in zip(visual, flags, strict=True):
        row[: len(flag)] = torch.tensor(flag)
    inputs = {
        "input_ids": t.ids, "attention_mask": t.attention.bool(), "labels": t.labels,
        "pixel_values": with_dummies(pictures(scene)),
    }  # fmt: skip
    return Batch(inputs, visual)


def llava(scene: str, side: str, model: Any) -> Batch:
    model.config.tokenizer_padding_side = side
    t = tokens(scene, lambda _: [-200], side, {-200: PATCHES})
    images = torch.cat(with_dummies(pictures(scene)))
    inputs = {
        "input_ids": t.ids, "attention_mask": t.attention, "labels": t.labels, "images": images,
    }  # fmt: skip
    return Batch(inputs, t.visual)


def phi3_v(scene: str, side: str, model: Any) -> Batch:
    """Each row counts its images from -1."""
    t = tokens(scene, lambda _: [IMAGE] * PATCHES, side, {IMAGE: 1})
    is_image = t.ids == IMAGE
    ids = torch.where(is_image, -1 - (is_image.cumsum(dim=1) - 1) // PATCHES, t.ids)
    inputs = {"input_ids": ids, "attention_mask": t.attention, "labels": t.labels}
    if is_image.any():
        inputs["pixel_values"] = torch.cat(pictures(scene))
        inputs["image_sizes"] = torch.full((len(inputs["pixel_values"]), 2), 16)
    return Batch(inputs, t.visual)


def molmo(scene: str, side: str, model: Any) -> Batch:
    """Beside an image's patches stand words of its layout, which get no features."""
    t = tokens(scene, lambda _: [START, *[IMAGE] * PATCHES, END], side, {IMAGE: 1})
    inputs = {"input_ids": t.ids, "attention_mask": t.attention, "labels": t.labels}
    if t.visual.any():
        places = [row.nonzero().flatten() for row in t.visual]
        padded = pad_sequence(places, batch_first=True, padding_value=-1)
        inputs["image_input_idx"] = padded.view(len(places), -1, PATCHES)
        inputs["images"] = pad_sequence(pictures(scene), batch_first=True)
    return Batch(inputs, t.visual)


@dataclass(frozen=True)
class Case:
    """A model and batches for it.

    Attributes:
        title: the heading of its section in the page.
        make: the model. batch: of a scene, padded on that side.
        language_model: path of what gets `inputs_embeds`. layers: name of its list of layers.
        is_merged_inside: its layers are the first to get the features.
    """

    title: str
    make: Callable[[], Any]
    batch: Callable[[str, str, Any], Batch]
    language_model: str
    layers: str = "layers"
    is_merged_inside: bool = False

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.make().train()

    @property
    def place(self) -> Place:
        return Place(self.language_model, self.layers, self.is_merged_inside)


def _internvl() -> Any:
    model = originals.InternVLChatModel(originals.Config(llm_config=Qwen2Config(**SIZES)))
    model.img_context_token_id = IMAGE
    return model


def _minicpm(**more: Any) -> Any:
    return originals.MiniCPMV(originals.Config(llm_config=LlamaConfig(**SIZES, **more)))


def _deepseek() -> Any:
    config = originals.Config(language_config=LlamaConfig(**SIZES))
    return originals.DeepseekVLV2ForCausalLM(config)


def _ovis() -> Any:
    config = {"llm_config": Qwen2Config(**SIZES), "multimodal_max_length": LIMIT}
    return originals.Ovis(originals.Config(**config))


def _llava() -> Any:
    config = LlamaConfig(**SIZES, tokenizer_model_max_length=LIMIT)
    config.tokenizer_padding_side = "right"
    return originals.LlavaLlamaForCausalLM(config)


def _phi() -> Any:
    return originals_inside.Phi3VForCausalLM(LlamaConfig(**SIZES))


def _molmo() -> Any:
    return originals_inside.MolmoForCausalLM(originals.Config(vocab_size=SIZES["vocab_size"]))


CASES = {
    "internvl_chat": Case("InternVL-Chat", _internvl, internvl_chat, "language_model.model"),
    "minicpm_v": Case("MiniCPM-V 2.x", _minicpm, minicpm_v, "llm.model"),
    "minicpm_v+scaled": Case(
        "MiniCPM-V 2.x", lambda: _minicpm(scale_emb=12.0), minicpm_v, "llm.model"
    ),
    "deepseek_vl2": Case("DeepSeek-VL2", _deepseek, deepseek_vl2, "language.model"),
    "llava": Case("LLaVA", _llava, llava, "model"),
    "ovis": Case("Ovis 1.x", _ovis, ovis, "llm.model"),
    "phi3_v": Case("Phi-3.5-vision", _phi, phi3_v, "model", is_merged_inside=True),
    "molmo": Case("Molmo 1", _molmo, molmo, "model.transformer", "blocks", True),
}
PROCESSOR = SimpleNamespace(image_token_id=IMAGE)  # DeepSeek-VL2's knows the id
