# SPDX-License-Identifier: Apache-2.0
"""From scenes to batches for `LlavaForConditionalGeneration.forward`.

One sequence holds one image and many questions about it:

    <image> x 36 | how many 3 -> 1 | digit at left -> 7 | ...

A block mask lets each question see the image and itself, never another question, and positions
restart after the image, so that each question is answered exactly as if it were asked alone. The
image, most of the tokens, is encoded once for all of them.

Training on text alone puts a description of the scene where the image would be.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prereg_kernels.checkup.images.processing import pillow_class
from prereg_kernels.demo.data.draws import stream_key
from prereg_kernels.demo.data.questions import (
    Question,
    check_families,
    description,
    questions,
    words,
)
from prereg_kernels.demo.data.scenes import SceneBatch, SceneConfig, Scenes

PAD, UNKNOWN, IMAGE = "<pad>", "<unk>", "<image>"
IGNORE = -100
"""The label of a position that is not trained on."""

Batch = dict[str, Tensor]

_PIXEL_MEAN, _PIXEL_STD = 0.5, 0.25
_FIRST_DESCRIBED = 1 << 40  # scenes that are described are never shown


def build_tokenizer(config: SceneConfig) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with every word that questions about such scenes need."""
    vocabulary = {word: i for i, word in enumerate((PAD, UNKNOWN, IMAGE, *words(config)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD, UNKNOWN, IMAGE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
    )


def pixel_values(images: NDArray[np.float32]) -> Tensor:
    """(B, H, W) images in [0, 1] -> (B, 3, H, W) float32, standardised, three equal channels."""
    standard = (torch.from_numpy(images) - _PIXEL_MEAN) / _PIXEL_STD
    return standard[:, None].expand(-1, 3, -1, -1)


def image_processor(side: int) -> Any:
    """The same for image files, as a checkpoint keeps it: the shorter side to `side` px, the centre
    cut out."""
    kind = pillow_class("CLIPImageProcessor")
    assert kind is not None
    return kind(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[_PIXEL_MEAN] * 3,
        image_std=[_PIXEL_STD] * 3,
    )


class Packer:
    """Packs scenes and their questions into batches.

    Args:
        tokenizer: from `build_tokenizer`.
        image_tokens: visual tokens of an image.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        # A plain dict: the tokenizer's own call costs more than the rest of the packing.
        self._ids: dict[str, int] = tokenizer.get_vocab()
        self._image_id, self._pad_id = self._ids[IMAGE], self._ids[PAD]

    def encode(self, text: Sequence[str]) -> list[int]:
        """The ids of some words.

        Raises:
            KeyError: a word that is not in the vocabulary.
        """
        return [self._ids[word] for word in text]

    def pack(self, images: NDArray[np.float32], asked: Sequence[Sequence[Question]]) -> Batch:
        """One row per image with all its questions, padded on the right.

        Args:
            images: (B, H, W) float32 in [0, 1].
            asked: the questions about each image.

        Returns:
            input_ids (B, L) int64; labels (B, L) int64, the answer's id at the answer's place and
            `IGNORE` elsewhere (the model shifts them); position_ids (B, L) int64; attention_mask
            (B, 1, L, L) bool, True = may look, or (B, L) int64 if each image has one question;
            pixel_values (B, 3, H, W) float32.

        Raises:
            ValueError: `images` and `asked` differ in length.
        """
        if len(images) != len(asked):
            raise ValueError(
                f"asked: expected one list for each of {len(images)} images, got {len(asked)}"
            )
        image = [self._image_id] * self.image_tokens
        return self._pack([image] * len(images), asked) | {"pixel_values": pixel_values(images)}

    def pack_text(
        self, described: Sequence[Sequence[str]], asked: Sequence[Sequence[Question]]
    ) -> Batch:
        """The same with a description in place of each image, of any length: no image token, no
        pixels, and labels on the answers alone."""
        return self._pack([self.encode(text) for text in described], asked)

    def _pack(self, seen: Sequence[list[int]], asked: Sequence[Sequence[Question]]) -> Batch:
        """A row for each of `seen`, the tokens that all of its questions look at."""
        rows = zip(seen, asked, strict=True)
        longest = max(len(head) + sum(len(q.prompt) + 1 for q in row) for head, row in rows)
        shape = (len(seen), longest)
        ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        blocks = np.full(shape, -1, dtype=np.int64)  # 0: seen, 1, 2, ...: question, -1: padding
        for b, (head, row) in enumerate(zip(seen, asked, strict=True)):
            start = len(head)
            ids[b, :start], positions[b, :start], blocks[b, :start] = head, range(start), 0
            for j, question in enumerate(row):
                tokens = [*self.encode(question.prompt), self._ids[question.answer]]
                end = start + len(tokens)
                ids[b, start:end] = tokens
                positions[b, start:end] = range(len(head), len(head) + len(tokens))
                blocks[b, start:end] = j + 1
                labels[b, end - 1] = tokens[-1]
                start = end
        one_each = all(len(row) == 1 for row in asked)
        mask = torch.from_numpy((blocks >= 0).astype(np.int64)) if one_each else _block_mask(blocks)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "attention_mask": mask,
        }

    def prompts(self, images: NDArray[np.float32], asked: Sequence[Question]) -> Batch:
        """One row per question, without its answer, padded on the left: what `generate` takes.

        Args:
            images: (B, H, W) float32, one per question.

        Returns:
            input_ids, attention_mask (B, L) int64 and pixel_values (B, 3, H, W) float32.
        """
        encoded = [self.encode(question.prompt) for question in asked]
        longest = max(len(tokens) for tokens in encoded)
        image = [self._image_id] * self.image_tokens
        rows = [[self._pad_id] * (longest - len(tokens)) + image + tokens for tokens in encoded]
        ids = torch.tensor(rows)
        return {
            "input_ids": ids,
            "attention_mask": (ids != self._pad_id).long(),
            "pixel_values": pixel_values(images),
        }


def _block_mask(blocks: NDArray[np.int64]) -> Tensor:
    """(B, 1, L, L) bool: causal, within one's own block and the image's.

    Padding sees itself, so that no row is empty: a softmax over nothing is NaN.
    """
    block = torch.from_numpy(blocks)
    length = block.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    query, key = block[:, :, None], block[:, None, :]
    mask = ((key == 0) & (query >= 0)) | (key == query)
    return (mask & causal)[:, None]


@dataclass(frozen=True)
class TrainStream:
    """The training data: micro-batch (step, micro) is a pure function of these settings,
    so resuming needs no sampler state and runs that share a seed see the same data.

    Attributes:
        scenes: where scenes come from.
        packer: makes batches.
        families: {question family: weight}.
        questions_per_scene: all scenes have as many, so all micro-batches hold as many labels.
        micro_batch: scenes in a micro-batch.
        accumulation: micro-batches in a step.
        distinct_scenes: scenes in all, with fixed questions; None: always new ones.
        text: describe scenes, always new ones and none of those that are shown, in place of
            showing them.
    """

    scenes: Scenes
    packer: Packer
    families: Mapping[str, float]
    questions_per_scene: int
    micro_batch: int
    accumulation: int = 1
    distinct_scenes: int | None = None
    text: bool = False

    def __post_init__(self) -> None:
        check_families(self.families)

    def micro_batches(self, step: int) -> list[Batch]:
        """The `accumulation` micro-batches of a step (counted from 0)."""
        return [self._micro_batch(step, micro) for micro in range(self.accumulation)]

    def _micro_batch(self, step: int, micro: int) -> Batch:
        first = (step * self.accumulation + micro) * self.micro_batch
        indices = list(range(first, first + self.micro_batch))
        if self.text:
            indices = [_FIRST_DESCRIBED + index for index in indices]
        elif self.distinct_scenes is not None:
            indices = [index % self.distinct_scenes for index in indices]
        batch = self.scenes.batch(indices)
        asked = [self._ask(batch, b, index) for b, index in enumerate(indices)]
        if self.text:
            told = [self._describe(batch, b, index) for b, index in enumerate(indices)]
            return self.packer.pack_text(told, asked)
        return self.packer.pack(batch.images, asked)

    def _describe(self, batch: SceneBatch, b: int, index: int) -> tuple[str, ...]:
        rng = random.Random(stream_key("description", self.scenes.split, self.scenes.seed, index))
        return description(batch.scenes[b], rng, grid=self.scenes.config.grid)

    def _ask(self, batch: SceneBatch, b: int, index: int) -> list[Question]:
        # The generator is the scene's, not the batch's: accumulation 1 x 8 and 4 x 2 ask the same.
        rng = random.Random(stream_key("questions", self.scenes.split, self.scenes.seed, index))
        return questions(
            batch.scenes[b],
            self.families,
            self.questions_per_scene,
            rng,
            grid=self.scenes.config.grid,
        )
