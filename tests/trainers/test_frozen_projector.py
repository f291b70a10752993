# SPDX-License-Identifier: Apache-2.0
"""A trainer says that the projector is frozen beside LoRA, where PRe gains nothing; only there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import Trainer

from prereg_kernels import apply_pre
from prereg_kernels.attach.resolver import find_family
from prereg_kernels.train.parts import parts_of
from prereg_kernels.trainers import PReCallback, PReTrainer, with_pre
from prereg_kernels.trainers.frozen import logger
from tests.attach.families.models import make_model
from tests.tiny import tiny_llava
from tests.trainers.rows import make_trainer
from tests.zoo import CASES, sample

DECODER = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
TRAINERS = {
    "PReTrainer": lambda: (PReTrainer, []),
    "PReCallback": lambda: (Trainer, [PReCallback()]),
    "with_pre": lambda: (with_pre(Trainer), []),
    "both": lambda: (with_pre(Trainer), [PReCallback()]),
}


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """What is said once is said in each test."""
    type(logger).warning_once.cache_clear()  # type: ignore[attr-defined]
    yield


def with_lora(model: Any, *whole: str, target: str = DECODER) -> Any:
    config = peft.LoraConfig(r=2, target_modules=target, modules_to_save=list(whole) or None)
    return peft.get_peft_model(model, config)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "frozen beside" in r.getMessage()]


@pytest.mark.parametrize("kind", TRAINERS)
def test_lora_alone(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, however PRe came to the trainer."""
    trainer, callbacks = TRAINERS[kind]()
    model = with_lora(tiny_llava())
    if kind == "PReTrainer":
        apply_pre(model)
    made = make_trainer(model, tmp_path, trainer, callbacks=callbacks)
    [line] = said(caplog)
    start = "PRe: the projector, model.multi_modal_projector, is frozen beside the LoRA adapter."
    assert line.startswith(start)
    assert "modules_to_save" in line and "prereg doctor MODEL" in line
    made.train()
    assert len(said(caplog)) == 1


@pytest.mark.parametrize("name", ("qwen2_5_vl", "qwen3_vl"))
def test_qwens(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their projector is within the encoder."""
    make_trainer(with_lora(make_model(name)), tmp_path, with_pre(Trainer))
    assert ["projector, model.visual.merger, is frozen" in line for line in said(caplog)] == [True]
    caplog.clear()
    make_trainer(with_lora(make_model(name), "merger"), tmp_path, with_pre(Trainer))
    assert not said(caplog)


WHOLE = {
    "gemma3": "model.multi_modal_projector",
    "mistral3": "model.multi_modal_projector",
    "aya_vision": "model.multi_modal_projector",
    "cohere2_vision": "model.multi_modal_projector",
    "paddleocr_vl": "model.projector",
    "lighton_ocr": "model.vision_projection",
    "internvl": "model.multi_modal_projector",
    "t5gemma2": "model.encoder.multi_modal_projector",
}


@pytest.mark.parametrize("name", [name for name in WHOLE if name in CASES])
def test_the_whole_projector_is_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PRe looks at one of its modules. Who let that train alone left the rest frozen, and the
    warning was silent; beside LoRA in both of T5Gemma 2's stacks it was silent anyway."""
    lora = {"target": r".*(language_model|text_model|decoder).*(q_proj|o_proj|qkv_proj)"}
    make_trainer(with_lora(sample(name).model, **lora), tmp_path, with_pre(Trainer))
    [line] = said(caplog)
    assert line.startswith(f"PRe: the projector, {WHOLE[name]}, is frozen")
    model = sample(name).model
    parts = set(parts_of(model)["projector"])
    own = {n for n, _ in model.named_parameters() if n.startswith(f"{WHOLE[name]}.")}
    assert parts == own
    caplog.clear()
    whole = WHOLE[name].rpartition(".")[2]
    make_trainer(with_lora(model, whole, **lora), tmp_path, with_pre(Trainer))
    assert not said(caplog)


@pytest.mark.parametrize("words", ("lm_head", "embed_tokens"))
def test_new_words_are_no_projector(
    words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They train beside an adapter often."""
    make_trainer(with_lora(tiny_llava(), words), tmp_path, with_pre(Trainer))
    assert len(said(caplog)) == 1


def test_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a projector trains, whole or adapted; and where no adapter does: not measured."""
    full = tiny_llava()
    full.model.multi_modal_projector.requires_grad_(False)
    for model in (
        with_lora(tiny_llava(), "multi_modal_projector"),
        with_lora(tiny_llava(), target="all-linear"),
        full,
        tiny_llava(),
    ):
        make_trainer(model, tmp_path, with_pre(Trainer))
    assert not said(caplog)


def test_a_projector_within_the_language_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the layout of the first LLaVA, by a family of one's own."""

    def made(*whole: str) -> Any:
        model: Any = tiny_llava()
        inner = model.model.language_model
        inner.mm_projector = model.model.multi_modal_projector
        family = find_family(model)
        mine = replace(family, name="mine", projector="model.language_model.mm_projector")
        lora = with_lora(model, *whole)
        apply_pre(lora, family=mine)
        return lora

    make_trainer(made(), tmp_path, PReTrainer)
    assert len(said(caplog)) == 1
    caplog.clear()
    type(logger).warning_once.cache_clear()  # type: ignore[attr-defined]
    make_trainer(made("mm_projector"), tmp_path, PReTrainer)
    assert not said(caplog)


def test_a_model_that_does_not_give_its_embeddings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers' default for a class that names its table otherwise."""
    model = with_lora(tiny_llava())

    def neither(self: Any) -> Any:
        raise NotImplementedError

    apply_pre(model)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        monkeypatch.setattr(type(model.get_base_model()), name, neither)
    make_trainer(model, tmp_path, PReTrainer)
    assert len(said(caplog)) == 1
