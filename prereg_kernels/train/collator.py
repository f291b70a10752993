# SPDX-License-Identifier: Apache-2.0
"""Samples to a batch, by the model's own processor; what cannot be used is left out and named."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prereg_kernels.checkup.images.reading import SkipImage, inside, open_rgb
from prereg_kernels.train.chats import IGNORED, Span, adds_special, label, render, tokenize
from prereg_kernels.train.placeholders import check_texts, placeholders
from prereg_kernels.train.rows import pack
from prereg_kernels.train.sample import BadSampleError, Message, Sample
from prereg_kernels.train.waiting import within

SEEN = "samples"
"""A batch's entry beside the model's: (how many samples it was made of, [(where, reason)] of those
that were left out)."""
UNPADDED = "unpadded"
"""Of a packed batch, beside it: its tokens without the padding, which no mask tells any more."""


@dataclass(frozen=True)
class Failed:
    """A sample that could not be read.

    Attributes:
        where, reason: as in bad_samples.jsonl.
        has_images: whether it should have had some.
    """

    where: str
    reason: str
    has_images: bool = False


_LARGEST = 1 << 30  # bytes of an image file
_THINNEST = 200  # a side over the other
_BLANK = (64, 64)


def _picture(question: str, answer: str) -> Sequence[Message]:
    return (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    )


@dataclass(frozen=True)
class _Chat:
    where: str
    text: str
    spans: Sequence[Span]
    images: Sequence[Image.Image]


class Collator:
    """A batch of samples.

    Of an answer that reaches beyond `max_length` the rest is cut off. A sample whose images do, or
    of which no label is left, is a bad one. Where none is left the batch is a token without a
    label, so that no rank waits for this one.

    Where other ranks have images in their batches, and this one has none, it gets a hidden one: the
    vision encoder and the projector run on all ranks, or on none. Nothing attends to it, and
    neither loss sees it.

    Args:
        processor: with a tokenizer and a chat template.
        max_length: tokens of a sample.
        visual_ids: the ids that stand for images.

    Attributes:
        hides_image: whether other ranks may always have some.
        row_length: of packed rows, see `prereg_kernels.train.packing`; None: a sample a row.
        is_flat: whether all packed samples are in one row.
    """

    hides_image = False
    row_length: int | None = None
    is_flat = False

    def __init__(self, processor: Any, max_length: int, visual_ids: Collection[int]) -> None:
        self.processor, self.max_length = processor, max_length
        self._visual, self._visual_ids = frozenset(visual_ids), torch.tensor(sorted(visual_ids))
        self._placeholders = placeholders(processor, visual_ids)

    def __call__(
        self, items: Sequence[Sample | Failed | Sequence[Sample | Failed]]
    ) -> dict[str, Any]:
        """{what the model takes, "labels": (count, length), SEEN: ...}, of samples, or of rows."""
        samples = flat(items)
        bad: list[tuple[str, str]] = []
        chats: list[_Chat] = []
        for sample, contents in read_images(samples):
            if isinstance(sample, Failed):
                bad.append((sample.where, sample.reason))
                continue
            try:
                chats.append(self._chat(sample, contents))
            except (BadSampleError, SkipImage) as reason:
                bad.append((sample.where, str(reason)))
        batch = self._batch(chats, bad)
        shown = [x.has_images if isinstance(x, Failed) else bool(x.images) for x in samples]
        if (self.hides_image or any(shown)) and not torch.isin(
            batch["input_ids"], self._visual_ids
        ).any():
            if len(bad) < len(samples) and self.row_length is not None:
                raise ValueError(
                    "packing_length: expected images in each sample of a stream on several ranks, "
                    f"got text alone: {samples[0].where}"
                )
            batch = self._with_hidden_image(batch)
        elif len(bad) < len(samples) and self.row_length is not None:
            pad = self.processor.tokenizer.pad_token_id
            tokens = int(batch["attention_mask"].sum())
            batch = pack(batch, self.row_length, pad, is_flat=self.is_flat)
            return {**batch, SEEN: (len(samples), bad), UNPADDED: tokens}
        return {**batch, SEEN: (len(samples), bad)}

    def _batch(self, chats: list[_Chat], bad: list[tuple[str, str]]) -> dict[str, Tensor]:
        """Of those that can be used; the others are added to `bad`."""
        while chats:
            try:
                batch = self._process(chats)
                reasons = self._label(batch, chats)
            except Exception as error:  # of one of them, whatever a processor raises
                reasons = self._alone(chats, error)
            if not any(reasons):
                return batch
            bad += [(c.where, r) for c, r in zip(chats, reasons, strict=True) if r]
            chats = [c for c, r in zip(chats, reasons, strict=True) if not r]
        batch = dict(self.processor(text=["."], return_tensors="pt"))
        return {**batch, "labels": torch.full_like(batch["input_ids"], IGNORED)}

    def count(self, sample: Sample) -> tuple[int, int] | None:
        """(tokens of images, other tokens) of a sample; None: it cannot be used."""
        try:
            chats = [self._chat(sample, {})]
            ids = self._process(chats)["input_ids"]
        except Exception:  # it will be named where it is trained on
            return None
        visual = int(torch.isin(ids, self._visual_ids).sum())
        return visual, ids.numel() - visual

    def pair(self) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Two samples with an image each: one by one, and packed in a row."""
        whole = copy(self)
        whole.max_length = 1 << 20
        apart: list[dict[str, Tensor]] = []
        chats: list[_Chat] = []
        for shade, question in ((64, "What is it?"), (192, "And what would that be?")):
            text, spans = render(self.processor, _picture(question, "It is an image."))
            chats.append(_Chat("", text, spans, [Image.new("RGB", _BLANK, (shade,) * 3)]))
            batch = whole._process(chats[-1:])
            whole._label(batch, chats[-1:])
            apart.append(batch)
        batch = whole._process(chats)
        whole._label(batch, chats)
        pad = self.processor.tokenizer.pad_token_id
        return apart, pack(batch, batch["input_ids"].numel(), pad, is_flat=True)

    def _chat(self, sample: Sample, contents: Mapping[str, bytes]) -> _Chat:
        check_texts(sample.messages, self._placeholders)
        text, spans = render(self.processor, sample.messages)
        images = [
            open_image(x, sample.root, contents.get(x) if isinstance(x, str) else None)
            for x in sample.images
        ]
        return _Chat(sample.where, text, spans, images)

    def _process(self, chats: Sequence[_Chat]) -> dict[str, Tensor]:
        images = [list(chat.images) for chat in chats]
        batch = self.processor(
            text=[chat.text for chat in chats],
            images=images if any(images) else None,
            text_kwargs={
                "padding": True,
                "padding_side": "right",
                "add_special_tokens": adds_special(self.processor, chats[0].text),
            },
            images_kwargs={"return_tensors": "pt"},
        )
        # Tokens as lists: the tokenizer's own way to tensors takes as long as tokenizing (5.17)
        return {
            name: torch.tensor(x) if isinstance(x, list) and isinstance(x[0], (list, int)) else x
            for name, x in batch.items()
        }

    def _label(self, batch: dict[str, Tensor], chats: Sequence[_Chat]) -> list[str]:
        """Put the labels into the batch and cut it; why each sample cannot be used, or ""."""
        ids, sizes = batch["input_ids"], batch["attention_mask"].sum(dim=1).tolist()
        length = ids.shape[1]
        labels, reasons = [], []
        texts = tokenize(self.processor, [chat.text for chat in chats])
        for row, size, chat, plain in zip(ids.tolist(), sizes, chats, texts, strict=True):
            own, encode = row[:size], partial(self._encode, chat)
            try:
                found = label(own, chat.text, chat.spans, plain, encode)
            except BadSampleError as error:
                labels.append([IGNORED] * length)
                reasons.append(str(error))
                continue
            labels.append(found + [IGNORED] * (length - size))
            if not self._visual.isdisjoint(own[self.max_length :]):
                reasons.append(f"its images reach beyond {self.max_length} tokens, of {size}")
            elif set(found[1 : self.max_length]) <= {IGNORED}:
                reasons.append(f"no label is left within {self.max_length} tokens, of {size}")
            else:
                reasons.append("")
        batch["labels"] = torch.tensor(labels)
        for name, x in batch.items():
            if x.shape[:2] == ids.shape and length > self.max_length:
                batch[name] = x[:, : self.max_length]
        return reasons

    def _encode(self, chat: _Chat, text: str) -> list[int]:
        """The ids of a beginning of the chat, with the images that it has places for."""
        whole = self._process([_Chat(chat.where, text, (), chat.images)])
        return [int(x) for x in whole["input_ids"][0]]

    def _alone(self, chats: Sequence[_Chat], error: Exception) -> list[str]:
        """Which of them the processor refuses.

        Raises:
            Exception: it refuses none by itself.
        """
        reasons = []
        for chat in chats:
            try:
                self._process([chat])
                reasons.append("")
            except Exception as reason:
                reasons.append(f"{type(reason).__name__}: {' '.join(str(reason).split())}")
        if not any(reasons):
            raise error
        return reasons

    def _with_hidden_image(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with an image behind its first row, which the attention mask hides."""
        text, _ = render(self.processor, _picture(".", "."))
        hidden = self._process([_Chat("", text, (), [Image.new("RGB", _BLANK)])])
        ids = batch["input_ids"]
        tokens = {"labels"} | {n for n, x in hidden.items() if x.shape == hidden["input_ids"].shape}
        result = {**hidden, **batch}
        for name in tokens & batch.keys():
            fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORED}
            more = ids.new_full((len(ids), hidden["input_ids"].shape[1]), fill.get(name, 0))
            if name not in ("attention_mask", "labels"):
                more[0] = hidden[name][0]
            result[name] = torch.cat([batch[name], more.to(batch[name])], dim=1)
        return result


def flat(items: Sequence[Sample | Failed | Sequence[Sample | Failed]]) -> list[Sample | Failed]:
    """The samples of samples, or of rows."""
    samples: list[Sample | Failed] = []
    for item in items:
        samples += [item] if isinstance(item, (Sample, Failed)) else item
    return samples


def read_images(
    samples: Sequence[Sample | Failed],
) -> Iterator[tuple[Sample | Failed, dict[str, bytes]]]:
    """Each sample with the content of its image files, {path: content}."""
    paths = [
        (number, image, partial(_read, sample.root, image))
        for number, sample in enumerate(samples) if isinstance(sample, Sample)
        for image in sample.images if isinstance(image, str)
    ]  # fmt: skip
    contents: list[dict[str, bytes]] = [{} for _ in samples]
    failed: dict[int, Failed] = {}
    results = within([read for *_, read in paths])
    for (number, path, _), content in zip(paths, results, strict=True):
        if isinstance(content, bytes):
            contents[number][path] = content
        elif isinstance(content, (SkipImage, TimeoutError)):
            where = samples[number].where
            failed.setdefault(number, Failed(where, f"{path}: {content}", has_images=True))
        else:
            raise content
    for number, sample in enumerate(samples):
        yield failed.get(number, sample), contents[number]


def open_image(
    image: str | bytes | Image.Image, root: Path | None, content: bytes | None = None
) -> Image.Image:
    """An image in RGB.

    Args:
        content: of the file, where it has been read.

    Raises:
        BadSampleError: it cannot be read, or lies outside of `root`.
    """
    if isinstance(image, Image.Image):
        return _with_sides(image.convert("RGB"), "an image")
    name = "an image" if isinstance(image, bytes) else image
    try:
        if content is None:
            content = image if isinstance(image, bytes) else _read(root, image)
        return _with_sides(open_rgb(io.BytesIO(content)), name)
    except SkipImage as reason:
        raise BadSampleError(f"{name}: {reason}") from None


def _read(root: Path | None, name: str) -> bytes:
    assert root is not None
    path = inside(root, name)
    try:
        if path.stat().st_size > _LARGEST:
            raise SkipImage(f"a file of more than {_LARGEST:,} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise SkipImage("no such file") from None
    except OSError as error:
        raise SkipImage(f"cannot be read: {error.strerror}") from None


def _with_sides(image: Image.Image, name: str) -> Image.Image:
    """As Qwen2-VL's processor has it; CLIP's makes the shorter side 336 pixels, whatever it is."""
    if max(image.size) > _THINNEST * min(image.size):
        raise BadSampleError(f"{name}: a side of more than {_THINNEST} times the other")
    return image
