# SPDX-License-Identifier: Apache-2.0
"""`prereg evaluate`: how many questions of held-out data a model answers as they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from prereg_kernels._util.files import write_whole
from prereg_kernels.train.chats import adds_special
from prereg_kernels.train.collator import open_image
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.models import load_processor, load_whole
from prereg_kernels.train.order import Mixture
from prereg_kernels.train.placeholders import check_texts, placeholders
from prereg_kernels.train.sample import BadSampleError, Sample
from prereg_kernels.train.sources import open_source

EVALUATION, PREDICTIONS = "evaluation.json", "predictions.jsonl"
Chat = tuple[Sequence[Any], Sequence[Any]]
"""(messages up to a question, their images)"""
_LETTER = re.compile(r"\b([A-Z])\b")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Evaluation:
    """What a model answers.

    Attributes:
        questions: those that were asked: the last one of each sample.
        exact_match: share of them, in [0, 1], that are answered with the reference, but for case,
            blanks and a full stop.
        choices: questions whose reference is a letter alone.
        choice_accuracy: share of those whose answer's first letter of its own is the reference;
            None where there are none.
        commonest: exact match of always giving the commonest reference.
        bad: samples that could not be used.
    """

    questions: int
    exact_match: float
    choices: int
    choice_accuracy: float | None
    commonest: float
    bad: int


def evaluate(
    model: str | Path,
    data: DataConfig,
    out: Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Evaluation:
    """Ask a model the last question of each sample, greedily, and write two files to `out`.

    evaluation.json holds what this returns, predictions.jsonl a line a question.

    Raises:
        ValueError: no model, processor or data.
        OSError: a file cannot be read or written.
    """
    respondent = Respondent(model, device, dtype)
    mixture = Mixture([open_source(data)])
    asked, bad = [], 0
    for kind in (mixture.images > 0, mixture.images == 0):  # a batch has images, or none
        numbers = kind.nonzero()[0].tolist()
        for start in range(0, len(numbers), batch_size):
            samples = [mixture[number] for number in numbers[start : start + batch_size]]
            usable = [q for q in (_question(x, respondent) for x in samples) if q is not None]
            bad += len(samples) - len(usable)
            if usable:
                answers = respondent.answer(
                    [(question.messages, question.images) for question in usable],
                    max_new_tokens=max_new_tokens,
                )
                asked += list(zip(usable, answers, strict=True))
    if not asked:
        raise ValueError(f"{data.path}: expected questions, got {bad} samples that cannot be used")
    result = score([(question.reference, answer) for question, answer in asked], bad)
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"where": q.sample.where, "reference": q.reference, "answer": answer})
        for q, answer in asked
    ]
    write_whole(out / PREDICTIONS, "\n".join(lines) + "\n")
    write_whole(out / EVALUATION, json.dumps(asdict(result), indent=1) + "\n")
    return result


class Respondent:
    """A model that answers, by its own processor and chat template.

    Args:
        model: a directory, of an adapter too, or a name on the hub.
        dtype: None: as it is stored.

    Attributes:
        placeholders: what stands for an image in a text.

    Raises:
        ValueError: no model, or no processor.
    """

    def __init__(
        self,
        model: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._processor = load_processor(model)
        network = load_whole(model, dtype="auto" if dtype is None else dtype)
        self._network = network.to(device).eval()
        names = ("image_token_id", "video_token_id")
        ids = [getattr(network.config, name, None) for name in names]
        self.placeholders = placeholders(self._processor, [x for x in ids if x is not None])
        # `generate` fills in what it is not given from the model's own, such as num_beams
        own = network.generation_config
        network.generation_config = GenerationConfig(
            **{name: getattr(own, name) for name in _TOKENS}
        )

    def answer(self, chats: Sequence[Chat], *, max_new_tokens: int) -> list[str]:
        """An answer to each chat, greedily: all of them have images, or none has."""
        processor = self._processor
        texts = [
            processor.apply_chat_template([dict(m) for m in messages], add_generation_prompt=True)
            for messages, _ in chats
        ]
        images = [list(pictures) for _, pictures in chats]
        batch = processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=adds_special(processor, texts[0]),
        ).to(self._network.device, self._network.dtype)
        with torch.inference_mode():
            written = self._network.generate(
                **batch, do_sample=False, max_new_tokens=max_new_tokens
            )
        new = written[:, batch["input_ids"].shape[1] :]
        decoded: list[str] = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in decoded]


@dataclass(frozen=True)
class _Question:
    sample: Sample
    messages: Sequence[Any]
    images: Sequence[Any]
    reference: str


def _question(sample: Any, respondent: Respondent) -> _Question | None:
    """The sample's last answer as a question; None where it cannot be used."""
    if not isinstance(sample, Sample):
        return None
    messages = list(sample.messages)
    while messages[-1]["role"] != "assistant":
        messages.pop()
    *before, last = messages
    reference = "".join(part["text"] for part in last["content"] if part["type"] == "text")
    try:
        check_texts(before, respondent.placeholders)
        images = [open_image(image, sample.root) for image in sample.images]
    except BadSampleError:
        return None
    shown = sum(part["type"] == "image" for m in before for part in m["content"])
    return _Question(sample, before, images[:shown], reference)


def _plain(text: str) -> str:
    return _unstopped(" ".join(text.lower().split()))


def _unstopped(text: str) -> str:
    """Without blanks around it, and without a full stop at its end."""
    return text.strip().removesuffix(".").rstrip()


def score(pairs: Sequence[tuple[str, str]], bad: int) -> Evaluation:
    """Of pairs of a reference and an answer, at least one."""
    references = [_plain(reference) for reference, _ in pairs]
    right = sum(_plain(reference) == _plain(answer) for reference, answer in pairs)
    chosen = list(_choices(pairs))
    return Evaluation(
        questions=len(pairs),
        exact_match=right / len(pairs),
        choices=len(chosen),
        choice_accuracy=sum(chosen) / len(chosen) if chosen else None,
        commonest=Counter(references).most_common(1)[0][1] / len(pairs),
        bad=bad,
    )


def _choices(pairs: Sequence[tuple[str, str]]) -> Iterator[bool]:
    for given, answer in pairs:
        reference = _unstopped(given)
        if re.fullmatch("[A-Z]", reference):
            letter = _LETTER.search(answer)
            yield letter is not None and letter[1] == reference
