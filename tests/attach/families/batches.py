# SPDX-License-Identifier: Apache-2.0
"""Batches for the models of the families: words and visual tokens, padded, with pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.attach.families.models import CASES, NEW, VIDEO, Case, Inputs, pooled

# A string for each sequence: its images by name, v is the family's video. The side to pad.
SCENES = {
    "images": (("a", "a"), "right"),
    "several images": (("aa", "a"), "right"),
    "uneven images": (("a", "b", "ba"), "right"),
    "video": (("v", "av"), "right"),
    "text only": (("", ""), "right"),
    "some text only": (("a", ""), "right"),
    "left padding": (("a", "aa", ""), "left"),
}


class Batch(NamedTuple):
    inputs: Inputs  # of the model's forward
    visual: Tensor  # bool, (rows, length): the visual positions
    features: Tensor  # what the model makes of the pixels, a row for each visual position
    images: list[int]  # the visual tokens of each image, or piece of a video


def has(name: str, scene: str) -> bool:
    """Whether the family has the images or the video of the scene."""
    case, kinds = CASES[name], set("".join(SCENES[scene][0]))
    return kinds <= {*case.sizes, *("v" if case.video else "")}


def make_batch(name: str, model: Any, scene: str = "several images") -> Batch:
    """The scene, as the family's processor would lay it out."""
    rows, side = SCENES[scene]
    return lay_out(name, model, rows, side, seed=len(scene))


@torch.no_grad()
def lay_out(
    name: str, model: Any, rows: Sequence[str], side: str = "right", seed: int = 0
) -> Batch:
    """A batch of these rows, strings as in `SCENES`."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    sequences, images = [], []
    for row in rows:
        words = torch.randint(3, 40, (len(row) + 7,), generator=generator).tolist()
        sequence = [1, words.pop()]
        for kind in row:
            tokens = _tokens(case, model, kind)
            sequence += [NEW, *tokens, NEW, words.pop()]
            images += [len(list(run)) for token, run in groupby(tokens) if token != NEW]
        sequences.append(torch.tensor(sequence + words))

    def pad(tensors: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(tensors), batch_first=True, padding_side=side)

    input_ids = pad(sequences)
    kinds = (input_ids == case.image_token) + 2 * (input_ids == VIDEO)
    attention_mask = pad([torch.ones_like(sequence) for sequence in sequences])
    labels = input_ids.where((attention_mask == 1) & (kinds == 0), -100)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    inputs |= case.types(kinds)

    embeddings = torch.zeros(*input_ids.shape, model.get_input_embeddings().weight.shape[1])
    image_rows = [[case.sizes[kind] for kind in row if kind != "v"] for row in rows]
    if any(image_rows):
        inputs |= case.images(image_rows)
        embeddings[kinds == 1] = _image_features(model, case.images(image_rows))
    video_rows = [[case.video for kind in row if kind == "v"] for row in rows]
    if any(video_rows):
        inputs |= case.videos(video_rows)
        embeddings[kinds == 2] = _video_features(model, case.videos(video_rows))
    return Batch(inputs, kinds > 0, embeddings[kinds > 0], images)


def _tokens(case: Case, model: Any, kind: str) -> list[int]:
    """The visual tokens of one image or video; as many as the model makes features of it alone."""
    if kind != "v":
        return [case.image_token] * len(_image_features(model, case.images([[case.sizes[kind]]])))
    count = len(_video_features(model, case.videos([[case.video]]))) // case.pieces
    piece = [NEW, *[VIDEO] * count]
    return (piece * case.pieces)[1:]


def _image_features(model: Any, pixels: Inputs) -> Tensor:
    return torch.cat(pooled(model.get_image_features(*pixels.values())))


def _video_features(model: Any, pixels: Inputs) -> Tensor:
    newline = getattr(model.model, "image_newline", None)
    layers = {}
    if newline is not None:  # without a default before 5
        names = ("vision_feature_layer", "vision_feature_select_strategy")
        layers = {name: getattr(model.config, name) for name in names}
    videos = pooled(model.get_video_features(*pixels.values(), **layers))
    if newline is not None and not videos[0][-1].equal(newline):  # LLaVA-OneVision ends one with it
        videos = [torch.cat((video, newline[None])) for video in videos]
    return torch.cat(videos)
