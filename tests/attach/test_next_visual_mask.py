# SPDX-License-Identifier: Apache-2.0
"""`pre.next_visual_mask`: the visual tokens of one forward pass, where ids do not say so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prereg_kernels import Family, apply_pre, remove_pre
from prereg_kernels.attach.handle import state_of
from tests.attach.families.models import pooled
from tests.attached import NON_REENTRANT, compare, eager_term
from tests.tiny import IMAGE_TOKEN, PATCHES, gradients, make_batch, tiny_llava

# Masks of any positions, to see that they count: the first steps tell that few are visual.
pytestmark = pytest.mark.filterwarnings("ignore:PRe. .* positions of the batch")


def embedded(model: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The batch without ids and pixels, but with embeddings; and where its visual tokens are."""
    mask = batch["input_ids"] == IMAGE_TOKEN
    with torch.no_grad():
        states = model.get_input_embeddings()(batch["input_ids"])
        states[mask] = torch.cat(pooled(model.get_image_features(batch["pixel_values"])))
    kept = {name: x for name, x in batch.items() if name not in ("input_ids", "pixel_values")}
    return kept | {"inputs_embeds": states}, mask


def elsewhere(batch: Mapping[str, Any], seed: int = 3) -> Tensor:
    """A mask that ids do not know of."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch["labels"].shape, generator=generator) < 0.4
    assert mask.any() and not mask.all()
    return mask


def step(model: Any, batch: Any, mask: Tensor | None, run: Any = None) -> dict[str, Tensor]:
    """The gradients of a step with this mask."""
    model.zero_grad()
    model._prereg.next_visual_mask = mask
    (run or model)(**batch).loss.backward()
    return gradients(model)


def by_definition(
    model: Any, batch: Any, mask: Tensor, images: list[int] | None = None, **options: Any
) -> dict[str, Tensor]:
    """The same from the model's own activations; PRe is gone from the model then."""
    pre = model._prereg
    weight, heads = pre.config.weight, pre.heads
    model.zero_grad()
    remove_pre(model)
    model.gradient_checkpointing_disable()
    lm, term = eager_term(model, batch, heads, mask, images=images, **options)
    (lm + weight * term).backward()
    expected = gradients(model)
    for layer, head in heads.items():
        expected |= {f"pre_heads.{layer}.{n}": p.grad for n, p in head.named_parameters()}
    return expected


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("call", ("model", "forward", "inner"))
def test_gradients_without_ids(call: str, checkpointing: bool) -> None:
    model = tiny_llava()
    batch, mask = embedded(model, make_batch((1, 2)))
    apply_pre(model, layers=(1, 3))
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)

    def inner(labels: Tensor, **inputs: Any) -> Any:
        """As wrappers that go past the model's own call."""
        logits = model.lm_head(model.model(**inputs).last_hidden_state)
        loss = model.loss_function(logits, labels, vocab_size=logits.shape[-1])
        return type("Output", (), {"loss": loss})

    ours = step(
        model, batch, mask, {"model": model, "forward": model.forward, "inner": inner}[call]
    )
    assert model._prereg.next_visual_mask is None
    assert model._prereg.metrics()["visual_tokens"] == 3 * PATCHES
    compare(ours, by_definition(model, batch, mask))


@pytest.mark.parametrize("checkpointing", (False, True))
def test_gradients_of_other_tokens_than_the_ids_say(checkpointing: bool) -> None:
    """Attention hides some of them, which are padding."""
    model, batch = tiny_llava(), make_batch((1, 2, 0))
    mask = elsewhere(batch)
    batch["attention_mask"][:, :3] = 0
    assert mask[:, :3].any()
    apply_pre(model)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    ours = step(model, batch, mask)
    assert model._prereg.metrics()["visual_tokens"] == mask[:, 3:].sum()
    compare(ours, by_definition(model, batch, mask & batch["attention_mask"].bool()))


@pytest.mark.parametrize("hidden", (False, True))
def test_gradients_of_an_anchor_function(hidden: bool) -> None:
    """It gives a row for each token of the mask, or for each that attention shows."""
    model, batch = tiny_llava(), make_batch((1, 2))
    mask = elsewhere(batch)
    rows = torch.randn(int(mask.sum()), 5, generator=torch.Generator().manual_seed(1))
    shown = mask
    if hidden:
        batch["attention_mask"][:, :3] = 0
        shown = mask & batch["attention_mask"].bool()
    apply_pre(model, anchor=lambda inputs: rows, anchor_features=5)
    ours = step(model, batch, mask)
    visible = rows[shown[mask]]
    assert hidden == (len(visible) < len(rows))
    compare(ours, by_definition(model, batch, shown, anchor=lambda inputs: visible))


def test_gradients_of_whole_images() -> None:
    model = tiny_llava()
    batch, mask = embedded(model, make_batch((1, 2)))
    apply_pre(
        model, level="global", family=Family("runs", images="runs")
    )  # LLaVA's are counted by their pixels
    mask[1, 3] = False  # in two, next to each other
    ours = step(model, batch, mask)
    assert model._prereg.metrics()["images"] == 3
    compare(ours, by_definition(model, batch, mask, images=[PATCHES, 3, PATCHES]))


def test_a_fraction_is_drawn_from_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    mask = elsewhere(batch)
    chosen = torch.arange(0, int(mask.sum()), 2)
    monkeypatch.setattr("prereg_kernels.attach.hooks.choose_tokens", lambda *_: chosen)
    apply_pre(model, token_fraction=0.5)
    ours = step(model, batch, mask)
    compare(ours, by_definition(model, batch, mask, chosen=chosen))


def test_a_pass_uses_it_once() -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    pre, mask = apply_pre(model), elsewhere(batch)
    plain = step(model, batch, None)
    masked = step(model, batch, mask)
    assert not torch.equal(plain["pre_heads.2.weight_0"], masked["pre_heads.2.weight_0"])
    again = step(model, batch, None)
    assert all(torch.equal(again[name], x) for name, x in plain.items())
    assert int(pre.count(batch)) == 3 * PATCHES  # by ids
    pre.next_visual_mask = mask
    assert pre.next_visual_mask is mask and int(pre.count(batch)) == 3 * PATCHES
    pre.next_visual_mask = None
    again = step(model, batch, pre.next_visual_mask)
    assert all(torch.equal(again[name], x) for name, x in plain.items())


@pytest.mark.parametrize("value_in_eval", (False, True))
def test_evaluating_passes_use_it_too(value_in_eval: bool) -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    pre, mask = apply_pre(model, value_in_eval=value_in_eval), elsewhere(batch)
    pre.next_visual_mask = mask
    with torch.no_grad():
        model.eval()(**batch)
    assert pre.next_visual_mask is None
    figures = pre.metrics()
    if value_in_eval:
        assert figures["visual_tokens"] == mask.sum()
        with torch.no_grad():
            _, term = eager_term(model, batch, pre.heads, mask)
        assert figures["pre_loss"] == pytest.approx(term.item(), rel=1e-5)
    model.train()(**batch)
    assert pre.metrics()["visual_tokens"] == 3 * PATCHES


def test_generation_uses_it_for_the_prompt() -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    pre, mask = apply_pre(model, value_in_eval=True), elsewhere(batch)
    pre.next_visual_mask = mask
    del batch["labels"]
    model.eval().generate(**batch, max_new_tokens=3, do_sample=False)
    assert pre.next_visual_mask is None and pre.metrics()["visual_tokens"] == mask.sum()


def test_micro_batches_set_it_each_time() -> None:
    """With the step's denominator they add up to the mean over all of their tokens."""
    model, batches = tiny_llava(), [make_batch((1, 2)), make_batch((0, 1), seed=1)]
    masks = [elsewhere(batch, seed) for seed, batch in enumerate(batches)]
    pre = apply_pre(model)
    pre.denominator = int(sum(mask.sum() for mask in masks))
    for batch, mask in zip(batches, masks, strict=True):
        pre.next_visual_mask = mask
        model(**batch).loss.backward()
    ours = gradients(model)
    heads = pre.heads
    model.zero_grad()
    remove_pre(model)
    for batch, mask in zip(batches, masks, strict=True):
        lm, term = eager_term(model, batch, heads, mask)
        (lm + pre.config.weight * term * (int(mask.sum()) / pre.denominator)).backward()
    expected = gradients(model)
    expected |= {f"pre_heads.2.{n}": p.grad for n, p in heads[2].named_parameters()}
    compare(ours, expected)


def run_checkpointed(
    model: Any, use_reentrant: bool, as_argument: bool, inside: Tensor | None = None
) -> Callable[..., Any]:
    """The call within a checkpoint, which backward runs again; its loss as the model's output."""
    start = torch.zeros((), requires_grad=True)

    def run(labels: Tensor, **inputs: Any) -> Any:
        names, given = list(inputs), list(inputs.values())

        def call(x: Tensor, *rows: Tensor) -> Tensor:
            if inside is not None:
                model._prereg.next_visual_mask = inside.clone()
            now = dict(zip(names, rows, strict=True)) if as_argument else inputs
            return model(**now, labels=labels).loss + x

        rows = given if as_argument else []
        loss = checkpoint(call, start, *rows, use_reentrant=use_reentrant)
        return type("Output", (), {"loss": loss})

    return run


@pytest.mark.parametrize("as_argument", (False, True), ids=("closure", "argument"))
@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("inside", (False, True), ids=("set outside", "set inside"))
@pytest.mark.parametrize("with_ids", (False, True))
def test_a_checkpoint_around_the_call(
    use_reentrant: bool, as_argument: bool, inside: bool, with_ids: bool
) -> None:
    """Backward runs each call again, the last one first, and each finds the mask that it had."""
    model = tiny_llava()
    batches = [make_batch((1, 2)), make_batch((0, 1), seed=1), make_batch((2, 2), seed=2)]
    masks: list[Tensor | None] = [elsewhere(batch, seed) for seed, batch in enumerate(batches)]
    if with_ids and not inside:
        masks[1] = None  # by its ids
    if not with_ids:
        batches = [embedded(model, batch)[0] for batch in batches]
    pre = apply_pre(model)

    def train(wrapped: bool) -> dict[str, Tensor]:
        model.zero_grad()
        losses = []
        for batch, mask in zip(batches, masks, strict=True):
            run = model
            if wrapped:
                run = run_checkpointed(model, use_reentrant, as_argument, mask if inside else None)
            if not (wrapped and inside):
                pre.next_visual_mask = mask
            losses.append(run(**batch).loss)
        waiting = torch.ones(1, 1, dtype=torch.bool)
        pre.next_visual_mask = waiting  # of a pass after this backward, which leaves it alone
        torch.stack(losses).sum().backward()
        assert pre.next_visual_mask is (None if wrapped and inside else waiting)
        return gradients(model)

    ours, expected = train(True), train(False)
    assert expected["pre_heads.2.weight_0"].norm() > 0
    assert all(torch.equal(ours[name], x) for name, x in expected.items())


@pytest.mark.parametrize("other", ("a mask", "ids"))
def test_one_batch_with_two_masks_cannot_be_told_apart(other: str) -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    pre, run = apply_pre(model), run_checkpointed(model, False, False)
    for seed in range(2):  # one after the other is fine, and evaluation in between
        step(model, batch, elsewhere(batch, seed), run)
        pre.next_visual_mask = elsewhere(batch, 9)
        model.eval()(**batch)
        model.train()
    pre.next_visual_mask = elsewhere(batch, 2)
    first = run(**batch).loss
    pre.next_visual_mask = elsewhere(batch, 3) if other == "a mask" else None
    second = run(**batch).loss
    with pytest.raises(ValueError, match=r"next_visual_mask: .* set it within the function"):
        (first + second).backward()


def test_masks_of_batches_that_are_gone_go_too() -> None:
    model = tiny_llava()
    apply_pre(model)
    for seed in range(3):
        batch = make_batch((1, 2), seed=seed)
        step(model, batch, elsewhere(batch))
    assert len(state_of(model._prereg).next_mask.kept) == 1


def test_a_copy_takes_no_mask_over() -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(model)
    step(model, batch, elsewhere(batch))
    pre.next_visual_mask = elsewhere(batch)
    clone = copy.deepcopy(model)
    assert clone._prereg.next_visual_mask is None and pre.next_visual_mask is not None
    clone(**batch)
    assert clone._prereg.metrics()["visual_tokens"] == 3 * PATCHES


@pytest.mark.parametrize(
    "mask, exception, message",
    (
        ([[True]], TypeError, "expected a Tensor or None, got list"),
        (torch.ones(2, 14), TypeError, r"expected dtype torch\.bool, got torch\.float32"),
        (torch.ones(28, dtype=torch.bool), ValueError, r"\(rows, length\), got \(28,\)"),
    ),
)
def test_what_is_no_mask(mask: Any, exception: type[Exception], message: str) -> None:
    pre = apply_pre(tiny_llava())
    with pytest.raises(exception, match=f"next_visual_mask: .*{message}"):
        pre.next_visual_mask = mask
    assert pre.next_visual_mask is None


@pytest.mark.parametrize("shape", ((2, 13), (3, 14), (14, 2)))
@pytest.mark.parametrize("with_ids", (False, True))
def test_a_mask_of_another_shape(shape: tuple[int, int], with_ids: bool) -> None:
    model, batch = tiny_llava(), make_batch()
    if not with_ids:
        batch = embedded(model, batch)[0]
    pre = apply_pre(model)
    pre.next_visual_mask = torch.ones(shape, dtype=torch.bool)
    sizes = rf"{shape[0]}, {shape[1]}\), got inputs_embeds of \(2, 14\)"
    with pytest.raises(ValueError, match=rf"next_visual_mask: .*\({sizes}"):
        model(**batch)


def test_a_mask_on_another_device() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    pre.next_visual_mask = torch.ones(2, 14, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match=r"next_visual_mask: expected it on cpu.*, got meta"):
        model(**batch)


def test_neither_ids_nor_a_mask() -> None:
    model = tiny_llava()
    batch, _ = embedded(model, make_batch())
    apply_pre(model)
    with pytest.raises(ValueError, match=r"input_ids: .* or a mask in pre\.next_visual_mask"):
        model(**batch)


def test_gradients_of_a_sequence_that_the_model_expands() -> None:
    """The mask is of the decoder's sequence, whose shape `input_ids` do not have."""
    model, batch = tiny_llava(), make_batch((1, 1))
    del batch["labels"], batch["attention_mask"]
    pre = apply_pre(model)

    def twice(module: Any, args: Any, kwargs: Any) -> Any:
        states = kwargs["inputs_embeds"].repeat_interleave(2, dim=1)
        ignored = {"attention_mask": None, "position_ids": None}
        return args, kwargs | ignored | {"inputs_embeds": states}

    language_model = model.model.language_model
    language_model.register_forward_pre_hook(twice, with_kwargs=True, prepend=True)
    pre.next_visual_mask = mask = elsewhere({"labels": torch.zeros(2, 28)})
    loss = model(**batch).logits.square().mean()
    (loss + pre.loss).backward()
    ours, heads = gradients(model), pre.heads
    assert pre.metrics()["visual_tokens"] == mask.sum()
    model.zero_grad()
    remove_pre(model)
    _, term = eager_term(model, batch, heads, mask)
    (model(**batch).logits.square().mean() + 0.5 * term).backward()
    expected = gradients(model)
    expected |= {f"pre_heads.2.{n}": p.grad for n, p in heads[2].named_parameters()}
    compare(ours, expected)
