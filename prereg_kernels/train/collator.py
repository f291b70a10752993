"""Samples to a batch, by the model's own processor; what cannot be used is left out and named."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prereg_kernels.checkup.images.reading import SkipImage, inside, read_image
from prereg_kernels.train.chats import IGNORED, Span, adds_special, label, render
from prereg_kernels.train.sample import BadSampleError, Message, Sample
from prereg_kernels.train.waiting import within

SEEN = "samples"
"""A batch's entry beside the model's: (how many samples it was made of, [(where, reason)] of those
that were left out)."""


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
_PICTURE: Sequence[Message] = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "."}]},
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
    """

    hides_image = False

    def __init__(self, processor: Any, max_length: int, visual_ids: Collection[int]) -> None:
        self.processor, self.max_length = processor, max_length
        self._visual_ids = torch.tensor(sorted(visual_ids))

    def __call__(self, samples: Sequence[Sample | Failed]) -> dict[str, Any]:
        """{what the model takes, "labels": (count, length), SEEN: ...}."""
        bad: list[tuple[str, str]] = []
        chats: list[_Chat] = []
        for sample in samples:
            if isinstance(sample, Failed):
                bad.append((sample.where, sample.reason))
                continue
            try:
                chats.append(self._chat(sample))
            except (BadSampleError, SkipImage) as reason:
                bad.append((sample.where, str(reason)))
        batch = self._batch(chats, bad)
        shown = [x.has_images if isinstance(x, Failed) else bool(x.images) for x in samples]
        if (self.hides_image or any(shown)) and not torch.isin(
            batch["input_ids"], self._visual_ids
        ).any():
            batch = self._with_hidden_image(batch)
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

    def _chat(self, sample: Sample) -> _Chat:
        text, spans = render(self.processor, sample.messages)
        images = [open_image(image, sample.root) for image in sample.images]
        return _Chat(sample.where, text, spans, images)

    def _process(self, chats: Sequence[_Chat]) -> dict[str, Tensor]:
        images = [list(chat.images) for chat in chats]
        batch = self.processor(
            text=[chat.text for chat in chats],
            images=images if any(images) else None,
            padding=True,
            padding_side="right",
            return_tensors="pt",
            add_special_tokens=adds_special(self.processor, chats[0].text),
        )
        return dict(batch)

    def _label(self, batch: dict[str, Tensor], chats: Sequence[_Chat]) -> list[str]:
        """Put the labels into the batch and cut it; why each sample cannot be used, or ""."""
        ids, seen = batch["input_ids"], batch["attention_mask"].bool()
        labels = torch.full_like(ids, IGNORED)
        reasons = []
        for row, chat in enumerate(chats):
            own = ids[row][seen[row]]
            try:
                found = label(
                    self.processor, own.tolist(), chat.text, chat.spans, partial(self._encode, chat)
                )
            except BadSampleError as error:
                reasons.append(str(error))
                continue
            labels[row, : len(own)] = torch.tensor(found)
            is_cut = torch.isin(own[self.max_length :], self._visual_ids).any()
            if is_cut:
                reasons.append(f"its images reach beyond {self.max_length} tokens, of {len(own)}")
            elif (labels[row, 1 : self.max_length] == IGNORED).all():
                reasons.append(f"no label is left within {self.max_length} tokens, of {len(own)}")
            else:
                reasons.append("")
        batch["labels"] = labels
        length = ids.shape[1]
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
        text, _ = render(self.processor, _PICTURE)
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


def open_image(image: str | bytes | Image.Image, root: Path | None) -> Image.Image:
    """An image in RGB. Raises BadSampleError where it cannot be read, or lies outside of `root`."""
    if isinstance(image, Image.Image):
        return _with_sides(image.convert("RGB"), "an image")
    name = "an image" if isinstance(image, bytes) else image
    try:
        if isinstance(image, str):
            assert root is not None
            image = within(partial(_read, root, image))
        return _with_sides(Image.fromarray(read_image(io.BytesIO(image))), name)
    except (SkipImage, TimeoutError) as reason:
        raise BadSampleError(f"{name}: {reason}") from None


def _read(root: Path, name: str) -> bytes:
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
