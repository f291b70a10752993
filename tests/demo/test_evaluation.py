# SPDX-License-Identifier: Apache-2.0
"""Evaluation: answers by generation, counted right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from prereg_kernels.demo.data.packing import IMAGE, Packer, build_tokenizer
from prereg_kernels.demo.data.questions import FAMILIES
from prereg_kernels.demo.data.scenes import SceneConfig, Scenes
from prereg_kernels.demo.evaluation import evaluate, held_out_questions
from prereg_kernels.demo.model.llava import build_model
from tests.demo.tiny import MODEL


@pytest.fixture(scope="module")
def packer() -> Packer:
    return Packer(build_tokenizer(SceneConfig()), 36)


class _Always:
    """A model that gives the same answer to everything, at a known loss."""

    def __init__(self, packer: Packer, answer: str) -> None:
        self.token = packer.encode([answer])[0]
        self.training, self.device = True, torch.device("cpu")
        self.modes: list[bool] = []

    def eval(self) -> None:
        self.modes.append(False)

    def train(self, mode: bool) -> None:
        self.modes.append(mode)

    def __call__(self, **batch: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.tensor(float(len(batch["input_ids"]))))

    def generate(self, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        answers = torch.full((len(input_ids), 1), self.token)
        return torch.cat([input_ids, answers], dim=1)


def test_counting(packer: Packer) -> None:
    scenes, families = Scenes("test", 0), ("presence", "comparison", "read")
    model = _Always(packer, "yes")
    result = evaluate(model, packer, scenes, families, n_scenes=30, per_family=2, batch_scenes=20)
    batch = scenes.batch(range(30))
    asked = [q for row in held_out_questions(scenes, batch, 0, families, 2) for q in row]
    for family in families:
        answers = [question.answer for question in asked if question.family == family]
        assert result.asked[family] == len(answers) == 60
        assert result.accuracy[family] == answers.count("yes") / 60
        assert result.majority[family] == max(map(answers.count, answers)) / 60
    assert result.accuracy["read"] == 0.0
    assert result.mean_accuracy == pytest.approx(sum(result.accuracy.values()) / 3)
    assert result.lm_loss == pytest.approx((20 * 20 + 10 * 10) / 30)  # weighted by labels
    assert model.modes == [False, True]


def test_generation_is_greedy_and_repeatable(packer: Packer) -> None:
    model = build_model(MODEL, SceneConfig(), packer.tokenizer, seed=0).train()
    scenes = Scenes("test", 0)
    first = evaluate(model, packer, scenes, FAMILIES, n_scenes=8)
    again = evaluate(model, packer, scenes, FAMILIES, n_scenes=8, batch_scenes=3)
    assert first.accuracy == again.accuracy
    assert first.lm_loss == pytest.approx(again.lm_loss, rel=1e-4)
    assert model.training
    # By hand, with a forward pass instead of generate.
    batch = scenes.batch(range(8))
    asked = held_out_questions(scenes, batch, 0, ("read",), 1)
    prompts = packer.prompts(batch.images, [row[0] for row in asked])
    with torch.no_grad():
        best = model.eval()(**prompts).logits[:, -1].argmax(dim=1).tolist()
    right = sum(packer.encode([row[0].answer])[0] == b for row, b in zip(asked, best, strict=True))
    assert first.accuracy["read"] == right / 8
    assert (prompts["input_ids"] == packer.encode([IMAGE])[0]).sum() == 8 * 36


def test_questions_depend_on_the_scene_alone() -> None:
    scenes = Scenes("test", 0)
    whole = held_out_questions(scenes, scenes.batch(range(6)), 0, ("read", "count"), 3)
    part = held_out_questions(scenes, scenes.batch(range(4, 6)), 4, ("count",), 3)
    assert [row[3:] for row in whole[4:]] == part


def test_bad_arguments_are_named(packer: Packer) -> None:
    with pytest.raises(ValueError, match="unknown"):
        evaluate(_Always(packer, "yes"), packer, Scenes("test"), ("weather",))
    with pytest.raises(ValueError, match="n_scenes, per_family: expected at least 1"):
        evaluate(_Always(packer, "yes"), packer, Scenes("test"), ("count",), n_scenes=0)
