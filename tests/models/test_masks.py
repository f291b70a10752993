# SPDX-License-Identifier: Apache-2.0
"""Masks of the user's on a stand-in of each code base whose `input_ids` do not say, both ways.

`pre.next_visual_mask` before each pass, or `Family(visual_mask=)`, a function of the batch; in a
loop, with checkpointing, and in a trainer whose steps have two uneven micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from prereg_kernels import Family, apply_pre, eager_pre_loss, remove_pre
from prereg_kernels.trainers import PReTrainerMixin
from tests.attached import Place, compare, seen
from tests.models import code_bases
from tests.models.original_cases import CASES, IMAGE, Batch
from tests.models.test_originals import family_of
from tests.tiny import gradients
from tests.trainers.rows import make_trainer

WEIGHT, LAYERS = 3.0, (1, 3)
NOBODY = (10**6,)  # an id that no batch has


@dataclasses.dataclass(frozen=True)
class CodeBase:
    """A model, a scene's batch, and how PRe is told where things are.

    Attributes:
        mask: of a call's arguments. layers: their path. more: other fields of the family.
        place: as `seen` takes it. settings: of `apply_pre`.
        loss: of what the model returns for a batch without labels, and these.
    """

    make: Callable[[], Any]
    batch: Callable[[str, str, Any], Batch]
    mask: Callable[[Any], Callable[[Mapping[str, Any]], Tensor]]
    layers: str
    place: Place
    loss: Callable[[Any, Tensor], Tensor]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def model(self) -> Any:
        torch.manual_seed(0)
        model = self.make().train()
        model.accepts_loss_kwargs = False  # Trainer then divides the losses of micro-batches
        return model

    def family(self, model: Any, function: bool) -> Family:
        if function:
            return Family("Theirs", layers=self.layers, visual_mask=self.mask(model), **self.more)
        return Family("Theirs", layers=self.layers, visual_tokens=NOBODY, **self.more)


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def of_the_model(output: Any, labels: Tensor) -> Tensor:
    loss: Tensor = output.loss
    return loss


def of_logits(output: Any, labels: Tensor) -> Tensor:
    return shifted(getattr(output, "logits", output), labels)


def of_the_page(name: str) -> Callable[[Any], Callable[[Mapping[str, Any]], Tensor]]:
    """The page's function; for InternVL-Chat, which it gives ids, those."""

    def mask(model: Any) -> Callable[[Mapping[str, Any]], Tensor]:
        found = family_of(name, model).visual_mask
        return found or (lambda batch: batch["input_ids"] == model.img_context_token_id)

    return mask


def of_an_original(name: str, layers: str, loss: Callable[..., Tensor]) -> CodeBase:
    case = CASES[name]
    return CodeBase(case.make, case.batch, of_the_page(name), layers, case.place, loss)


CODE_BASES = {
    "LLaVA": of_an_original("llava", "model.layers", of_the_model),
    "InternVL-Chat": of_an_original("internvl_chat", "language_model.model.layers", of_the_model),
    "MiniCPM-V": of_an_original("minicpm_v", "llm.model.layers", of_logits),
    "NeMo": CodeBase(
        code_bases.nemo_model, code_bases.nemo_batch,
        lambda model: lambda batch: batch["mm_token_type_ids"] == 1,
        "language_model.model.layers", Place("language_model.model"), of_logits,
    ),
    "Megatron": CodeBase(
        code_bases.megatron_model, code_bases.megatron_batch,
        lambda model: lambda batch: batch["input_ids"] == IMAGE,
        "language_model.decoder.layers",
        Place("language_model.decoder", is_merged_inside=True, read=lambda x: x.transpose(0, 1)),
        of_logits,
        {
            "language_model": "language_model", "enters_at": 0,
            "streams": lambda states, width: states.transpose(0, 1),
        },
    ),
}  # fmt: skip
every_one = pytest.mark.parametrize("name", CODE_BASES)
both_ways = pytest.mark.parametrize("function", (False, True), ids=("next mask", "function"))
checkpointed = pytest.mark.parametrize("checkpointing", (False, True))


def split(base: CodeBase, batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """The arguments of the call, and the labels, which it gets where the model has a loss."""
    inputs, labels = dict(batch.inputs), batch.inputs["labels"]
    if base.loss is of_logits:
        del inputs["labels"]
    return inputs, labels


def by_definition(
    base: CodeBase, model: Any, heads: Mapping[int, Any], batches: list[Batch]
) -> dict[str, Tensor]:
    """The gradients of the mean of the losses plus the weight times L_PRe over all tokens."""
    for module in (model, *heads.values()):
        module.zero_grad()
    model.gradient_checkpointing_disable()
    total = sum(int(batch.visual.sum()) for batch in batches)
    for batch in batches:
        inputs, labels = split(base, batch)
        with seen(model, base.place) as states:
            lm = base.loss(model(**inputs), labels)
        terms = [
            eager_pre_loss(
                states[layer], states[0], head.weights, head.biases, visual_mask=batch.visual,
                reduction="sum",
            )
            for layer, head in heads.items()
        ]  # fmt: skip
        (lm / len(batches) + WEIGHT * torch.stack(terms).mean() / total).backward()
    expected = gradients(model)
    for layer, head in heads.items():
        expected |= {f"pre_heads.{layer}.{n}": p.grad for n, p in head.named_parameters()}
    return expected


def attached(base: CodeBase, function: bool, checkpointing: bool) -> tuple[Any, Any]:
    model = base.model()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    family = base.family(model, function)
    pre = apply_pre(model, family=family, layers=LAYERS, weight=WEIGHT)
    return model, pre


@every_one
@both_ways
@checkpointed
@pytest.mark.parametrize("scene", ("several images", "some text"))
def test_gradients(name: str, function: bool, checkpointing: bool, scene: str) -> None:
    base = CODE_BASES[name]
    model, pre = attached(base, function, checkpointing)
    batch = base.batch(scene, "right", model)
    inputs, labels = split(base, batch)
    if not function:
        pre.next_visual_mask = batch.visual
    loss = base.loss(model(**inputs), labels)
    loss.backward()
    ours, figures = gradients(model), pre.metrics()
    assert figures["visual_tokens"] == batch.visual.sum()
    heads = pre.heads
    remove_pre(model)
    compare(ours, by_definition(base, model, heads, [batch]))


class Outside(Trainer):
    """A code base's own, whose loss is computed outside of the model, where that has none."""

    base: CodeBase
    masks: list[Tensor] | None = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        labels = inputs["labels"]
        if self.base.loss is of_logits:
            del inputs["labels"]
        return self.base.loss(model(**inputs), labels)


class PReOutside(PReTrainerMixin, Outside):
    """What a user adds for `next_visual_mask`: the mask of each batch, and its count."""

    def mask_of(self, inputs: Any) -> Tensor | None:
        found = [b for b in self.batches if b.inputs["labels"] is inputs["labels"]]
        return found[0].visual if self.is_masked else None

    def count_rows(self, batch: Any) -> Tensor | None:
        mask = self.mask_of(batch)
        return super().count_rows(batch) if mask is None else mask.sum()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.pre.next_visual_mask = self.mask_of(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


@every_one
@both_ways
@checkpointed
def test_a_step_of_a_trainer(
    tmp_path: Path, name: str, function: bool, checkpointing: bool
) -> None:
    base = CODE_BASES[name]
    model, pre = attached(base, function, checkpointing)
    batches = [base.batch(scene, "right", model) for scene in ("several images", "some text")]
    assert batches[0].visual.sum() != batches[1].visual.sum()
    trainer: Any = make_trainer(model, tmp_path, PReOutside)
    trainer.base, trainer.batches, trainer.is_masked = base, batches, not function
    given = [batch.inputs for batch in batches]
    _, items = trainer.get_batch_samples(iter(given), 2, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 2
    for inputs in given:
        trainer.training_step(model, inputs, items)
    ours, heads = gradients(model), pre.heads
    remove_pre(model)
    compare(ours, by_definition(base, model, heads, batches))
