# SPDX-License-Identifier: Apache-2.0
"""A set of images as batches for a loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.attach.resolver import VISUAL_TOKENS, token_names
from prereg_kernels.checkup.batches import Batch, ImageFacts
from prereg_kernels.checkup.fingerprint import digest
from prereg_kernels.checkup.images.datasets import Sample, Samples
from prereg_kernels.checkup.images.layouts import check_tower, family_with_layout
from prereg_kernels.checkup.images.patches import owners
from prereg_kernels.checkup.images.processing import place
from prereg_kernels.checkup.images.reading import SkipImage
from prereg_kernels.checkup.loading import Loaded, Prepared
from prereg_kernels.checkup.model_files import naming

PURITY = 0.5
QUESTION = "Describe the image."
"""What stands behind the image in a chat template. Tokens before it cannot see it."""


class ImageBatches:
    """A set of images as batches for a loaded model.

    Args:
        loaded: the model with its processor.
        samples: the images.
        size: images in a batch.
        purity: the share of a token's box that an object must own to be its owner.

    Raises:
        ValueError: a size or purity out of range, or a model without an image token.
    """

    def __init__(
        self, loaded: Loaded, samples: Samples, *, size: int = 8, purity: float = PURITY
    ) -> None:
        if size < 1:
            raise ValueError(f"batch: expected at least 1 image, got {size}")
        if not 0 < purity <= 1:
            raise ValueError(f"purity: expected a share in (0, 1], got {purity}")
        self._loaded, self._samples, self._size, self._purity = loaded, samples, size, purity
        self._family = family_with_layout(loaded.config.model_type)
        check_tower(loaded.config.model_type, loaded.config)
        self._before, self._after, self._token = _surroundings(loaded)
        model: Any = loaded.model
        rows = model.get_input_embeddings().num_embeddings
        outside = [i for i in (self._token, *self._before, *self._after) if not 0 <= i < rows]
        if outside:
            raise ValueError(
                f"model: expected an embedding of the image token and of those around it, got "
                f"{rows} rows and token {outside[0]}"
            )

    def __len__(self) -> int:
        return -(-len(self._samples) // self._size)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Of the files of the images, of what is known of them, and of what prepares them."""
        return {
            **self._samples.fingerprint(range(len(self._samples))),
            "processor": _processor_of(self._loaded),
            "prompt": digest(self._before, self._token, self._after),
            "batch": str(self._size),
            "purity": str(self._purity),
        }

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`; images that cannot be used are left out of it and named."""
        first = index * self._size
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        rows: list[tuple[ImageFacts, Mapping[str, Tensor]]] = []
        skipped = []
        for number in range(first, min(first + self._size, len(self._samples))):
            try:
                rows.append(self._image(self._samples[number]))
            except SkipImage as reason:
                skipped.append((self._samples.name(number), str(reason)))
        return Batch(self._inputs(rows), tuple(facts for facts, _ in rows), tuple(skipped))

    def _image(self, sample: Sample) -> tuple[ImageFacts, Mapping[str, Tensor]]:
        grid, processed = place(self._loaded.config, self._loaded.processor, sample.image)
        objects = None
        if sample.mask is not None:
            objects = owners(grid, sample.mask, self._purity)
        facts = ImageFacts(
            sample.name, grid, objects, sample.labels, sample.object_labels, sample.image
        )
        return facts, processed

    def _inputs(self, rows: Sequence[tuple[ImageFacts, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
        if not rows:
            return {}
        sequences = []
        for facts, _ in rows:
            assert facts.grid is not None
            visual = [self._token] * len(facts.grid)
            sequences.append([*self._before, *visual, *self._after])
        longest = max(map(len, sequences))
        padding = _padding(self._loaded.config, self._token)
        ids = torch.full((len(rows), longest), padding)
        attention = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            attention[row, : len(sequence)] = 1
        pixels = {name: _joined([processed[name] for _, processed in rows]) for name in rows[0][1]}
        inputs = {"input_ids": ids, "attention_mask": attention, **pixels}
        if self._family.token_types is not None:
            inputs[self._family.token_types] = (ids == self._token).long()
        return inputs


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Along the first dimension; images in tiles, (1, tiles, 3, H, W), padded with empty tiles."""
    if parts[0].dim() == 5:
        longest = max(part.shape[1] for part in parts)
        padded = [part.new_zeros(1, longest, *part.shape[2:]) for part in parts]
        for whole, part in zip(padded, parts, strict=True):
            whole[:, : part.shape[1]] = part
        parts = padded
    return torch.cat(list(parts))


def check_same_inputs(names: Sequence[str], both: Sequence[Prepared]) -> None:
    """Raise ValueError unless two models get the same pixels and the same tokens before them.

    Else a difference of their numbers would be that of their inputs.
    """
    first, second = both
    if _processor_of(first) != _processor_of(second):
        apart = _apart(first.processor.to_dict(), second.processor.to_dict())
        raise ValueError(
            f"compare: expected models with the same image processor, got {apart}, of {names[0]} "
            f"and {names[1]}; --processor DIR has both use the one in DIR"
        )
    before = [_surroundings(each)[0] for each in both]
    if before[0] != before[1]:
        raise ValueError(
            "compare: expected models whose chat templates put the same tokens before an image; "
            f"those of {names[0]}, {len(before[0])}, and of {names[1]}, {len(before[1])}, differ. "
            "Put the tokenizer's files of one, its chat template among them, into both directories"
        )


def _processor_of(loaded: Loaded | Prepared) -> str:
    return digest(type(loaded.processor).__name__, str(loaded.processor))


def _apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The first settings that differ, and their values."""
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return ", ".join(f"{key} {first.get(key)} and {second.get(key)}" for key in keys[:3])


def _surroundings(loaded: Loaded | Prepared) -> tuple[list[int], list[int], int]:
    """The ids before and after an image's tokens, and the id of those.

    The chat template's where the tokenizer has one, so that the image stands where it stood in
    training; else the family's markers alone.
    """
    config = loaded.config
    family = family_with_layout(config.model_type)
    names = token_names(config)
    if not names:
        raise ValueError(
            f"model: expected the id of an image token in its config, got none of {VISUAL_TOKENS}"
        )
    token = int(getattr(config, names[0]))
    tokenizer = loaded.tokenizer
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        with naming(f"{tokenizer.name_or_path}: chat template"):  # code, in a sandbox
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(token) == 1:
            at = ids.index(token)
            return ids[:at], ids[at + 1 :], token
        raise ValueError(
            f"tokenizer: expected its chat template to put one image token ({token}) for an image, "
            f"got {ids.count(token)}"
        )
    before = []
    if tokenizer is not None and tokenizer.bos_token_id is not None:
        before.append(int(tokenizer.bos_token_id))
    start, end = ([getattr(config, name, None)] for name in family.markers or ("", ""))
    before += [int(marker) for marker in start if marker is not None]
    return before, [int(marker) for marker in end if marker is not None], token


def _padding(config: Any, token: int) -> int:
    text = config.get_text_config()
    padding = getattr(text, "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < text.vocab_size and padding != token:
        return padding
    return 0 if token != 0 else 1
