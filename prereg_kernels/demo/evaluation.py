# SPDX-License-Identifier: Apache-2.0
"""Answers by real greedy generation, one question a prompt, and the loss on held-out scenes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlavaForConditionalGeneration

from prereg_kernels.demo.data.draws import stream_key
from prereg_kernels.demo.data.packing import IGNORE, Packer
from prereg_kernels.demo.data.questions import Question, check_families, questions
from prereg_kernels.demo.data.scenes import SceneBatch, Scenes


@dataclass(frozen=True)
class Evaluation:
    """What a model answers.

    Attributes:
        accuracy: {family: share of right answers, in [0, 1]}.
        majority: {family: accuracy of always giving the family's most frequent answer}.
        asked: {family: number of questions}.
        lm_loss: mean cross-entropy of the answers, nats per answer, teacher-forced.
    """

    accuracy: dict[str, float]
    majority: dict[str, float]
    asked: dict[str, int]
    lm_loss: float

    @property
    def mean_accuracy(self) -> float:
        """Mean of the families' accuracies, each counting the same."""
        return sum(self.accuracy.values()) / len(self.accuracy)


def held_out_questions(
    scenes: Scenes, batch: SceneBatch, first: int, families: Sequence[str], per_family: int
) -> list[list[Question]]:
    """The test questions about each scene of a batch: `per_family` of each family, in order.

    Args:
        first: index of the batch's first scene, so that questions depend on the scene alone.
    """
    asked = []
    for b, scene in enumerate(batch.scenes):
        row: list[Question] = []
        for family in families:
            # One generator a family: what is asked of one does not depend on what else is asked.
            rng = random.Random(
                stream_key("evaluation", scenes.split, scenes.seed, first + b, family)
            )
            row += questions(scene, {family: 1.0}, per_family, rng, grid=scenes.config.grid)
        asked.append(row)
    return asked


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration,
    packer: Packer,
    scenes: Scenes,
    families: Sequence[str],
    *,
    n_scenes: int = 256,
    per_family: int = 1,
    batch_scenes: int = 64,
) -> Evaluation:
    """Ask `per_family` questions of each family about each of the first `n_scenes` scenes.

    The model is put into eval mode and back. Nothing is random.

    Raises:
        ValueError: no such family, or no scenes.
    """
    check_families(dict.fromkeys(families, 1.0))
    if n_scenes < 1 or per_family < 1:
        raise ValueError(f"n_scenes, per_family: expected at least 1, got {n_scenes}, {per_family}")
    was_training = model.training
    model.eval()
    device = model.device
    right: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = {family: Counter() for family in families}
    loss_sum, labels = 0.0, 0
    for first in range(0, n_scenes, batch_scenes):
        batch = scenes.batch(range(first, min(first + batch_scenes, n_scenes)))
        asked = held_out_questions(scenes, batch, first, families, per_family)
        packed = {name: x.to(device) for name, x in packer.pack(batch.images, asked).items()}
        count = int((packed["labels"] != IGNORE).sum())
        loss_sum += float(model(**packed).loss) * count
        labels += count
        flat = [(b, question) for b, row in enumerate(asked) for question in row]
        prompts = packer.prompts(
            batch.images[[b for b, _ in flat]], [question for _, question in flat]
        )
        produced = model.generate(
            **{name: x.to(device) for name, x in prompts.items()},
            max_new_tokens=1,
            do_sample=False,
        )[:, -1]
        given = packer.tokenizer.convert_ids_to_tokens(produced.tolist())
        for (_, question), answer in zip(flat, given, strict=True):
            right[question.family] += answer == question.answer
            answers[question.family][question.answer] += 1
    model.train(was_training)
    asked_of = {family: answers[family].total() for family in families}
    return Evaluation(
        accuracy={family: right[family] / asked_of[family] for family in families},
        majority={
            family: answers[family].most_common(1)[0][1] / asked_of[family] for family in families
        },
        asked=asked_of,
        lm_loss=loss_sum / labels,
    )
