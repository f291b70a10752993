# SPDX-License-Identifier: Apache-2.0
"""apply_pre on a tiny LLaVA: gradients are those of the definition, values as documented."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prereg_kernels import PReConfig, apply_pre, remove_pre
from tests.attached import NON_REENTRANT, anchor_of_pixels, both, compare, eager_term
from tests.helpers import assert_not_above, relative_error
from tests.tiny import IMAGE_TOKEN, LAYERS, PATCHES, WIDTH, gradients, make_batch, tiny_llava

BATCHES = {"images": (1, 1), "text only": (0, 0), "mixed": (1, 0), "two images": (2, 1)}


@pytest.mark.parametrize("images", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("layers", (None, (1, 3), [LAYERS]))
def test_gradients(images: tuple[int, ...], checkpointing: bool, layers: Any) -> None:
    batch = make_batch(images)
    ours, expected, metrics, (lm, term) = both(batch, checkpointing=checkpointing, layers=layers)
    compare(ours, expected)
    assert metrics["lm_loss"] == pytest.approx(lm, rel=1e-5)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4, abs=1e-7)
    assert metrics["visual_tokens"] == sum(images) * PATCHES


@pytest.mark.parametrize("checkpointing", (False, True))
def test_gradients_with_an_anchor_function(checkpointing: bool) -> None:
    ours, expected, metrics, (_, term) = both(
        make_batch((1, 2)), checkpointing=checkpointing, anchor=anchor_of_pixels, anchor_features=8
    )
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4)


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize(
    "loss, normalize", (("mse", "layer"), ("mse", "none"), ("smooth_l1", "l2"))
)
def test_gradients_of_other_losses(checkpointing: bool, loss: str, normalize: str) -> None:
    ours, expected, metrics, (_, term) = both(
        make_batch((1, 2)), checkpointing=checkpointing, loss=loss, normalize=normalize,
        activation="silu",
    )  # fmt: skip
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4) != 0


@pytest.mark.usefixtures("products")
def test_gradients_under_autocast() -> None:
    """On the mean of several batches, the rule of the loss: no worse than eager, against truth."""
    several = []
    for seed in range(8):
        batch = make_batch((1, 2), seed=seed)
        options = {"autocast": True, "weight": 5.0}
        ours, eager, metrics, (_, term) = both(batch, **options)
        truth = both(batch, upcast=torch.float64, **options)[1]
        assert metrics["pre_loss"] == pytest.approx(term, abs=2**-9)  # eager rounds to bfloat16
        several.append(
            {
                name: relative_error(ours[name], x) - relative_error(eager[name], x)
                for name, x in truth.items()
            }
        )
    assert_not_above(several, several[0])


@pytest.mark.parametrize("checkpointing", (False, True))
def test_two_forwards_then_two_backwards(checkpointing: bool) -> None:
    model = tiny_llava()
    apply_pre(model)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    batches = make_batch(seed=1), make_batch((0, 1), seed=2)
    for batch in batches:
        model(**batch).loss.backward()
    one_by_one = gradients(model)
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    for loss in losses:
        loss.backward()
    compare(gradients(model), one_by_one)


def test_the_value_is_the_lm_loss() -> None:
    model, batch = tiny_llava(), make_batch()
    plain = model(**batch).loss.item()
    pre = apply_pre(model)
    loss = model(**batch).loss
    assert loss.item() == plain
    assert pre.loss is None
    loss.backward()
    assert pre.metrics()["lm_loss"] == plain
    assert pre.metrics()["pre_loss"] != 0


def test_value_in_forward_adds_the_term() -> None:
    model, batch = tiny_llava(), make_batch()
    lm = model(**batch).loss.item()
    pre = apply_pre(model, value_in_forward=True, weight=2.0)
    loss = model(**batch).loss
    term = pre.metrics()["pre_loss"]
    assert term != 0
    assert loss.item() == pytest.approx(lm + 2 * term, rel=1e-6)
    model(**batch, return_dict=False)[0].backward()
    with_value = gradients(model)
    remove_pre(model)
    model.zero_grad()
    apply_pre(model, weight=2.0)
    model(**batch).loss.backward()
    compare(gradients(model), with_value)


def test_a_plain_dict_as_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """As code outside of transformers may return."""
    model, batch = tiny_llava(), make_batch()
    apply_pre(model)
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, **inputs: dict(forward(self, **inputs))
    )
    output = model(**batch)
    assert type(output) is dict and "logits" in output
    output["loss"].backward()
    compare(gradients(model), expected)
    monkeypatch.setattr(
        type(model), "forward", lambda self, **inputs: {**forward(self, **inputs), "loss": None}
    )
    with pytest.raises(TypeError, match="model: expected an output with a loss"):
        model(**batch)


def test_a_tuple_keeps_what_follows_the_loss() -> None:
    model, batch = tiny_llava(), make_batch()
    plain = model(**batch, return_dict=False)
    apply_pre(model)
    ours = model(**batch, return_dict=False)
    assert len(ours) == len(plain) > 1
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


def test_without_labels_the_term_is_on_the_handle() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    del batch["labels"]
    assert model(**batch).loss is None
    term = pre.loss
    term.backward()
    heads = pre.heads
    ours = heads[2].weight_0.grad.clone()
    heads[2].zero_grad()
    remove_pre(model)
    model(**batch)
    batch["labels"] = make_batch()["labels"]
    (0.5 * eager_term(model, batch, heads)[1]).backward()
    assert relative_error(ours, heads[2].weight_0.grad) < 2e-4


def test_the_handle_has_no_term_of_an_earlier_call() -> None:
    """Who adds `pre.loss` must never add it to a loss that has it."""
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    without = {name: x for name, x in batch.items() if name != "labels"}
    model(**without)
    assert pre.loss.requires_grad
    model(**batch)
    assert pre.loss is None


def test_denominator_makes_micro_batches_add_up() -> None:
    """One batch of eight equals four of two, with different numbers of visual tokens."""
    images = (1, 2, 0, 1, 2, 2, 1, 0)
    model = tiny_llava()
    pre = apply_pre(model, weight=3.0)
    whole = make_batch(images)
    for p in model.parameters():
        p.requires_grad_(False)
    for p in pre.heads[2].parameters():
        p.requires_grad_(True)
    model.enable_input_require_grads()
    model(**whole).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(expected) == 4

    model.zero_grad()
    pre.denominator = sum(images) * PATCHES
    first = 0
    for start in range(0, 8, 2):
        part = {k: v[start : start + 2] for k, v in whole.items() if k != "pixel_values"}
        count = sum(images[start : start + 2])
        part["pixel_values"] = whole["pixel_values"][first : first + count]
        first += count
        model(**part).loss.backward()
    for name, gradient in expected.items():
        assert relative_error(model.get_parameter(name).grad, gradient) < 2e-4, name


@pytest.mark.parametrize("with_denominator", (False, True))
def test_num_items_in_batch_scales_the_term(with_denominator: bool) -> None:
    """With the step's label count the LM loss is a share of the step's mean, and so is the term."""
    model, batch = tiny_llava(), make_batch((1, 0, 1))
    batch["labels"][:2, 0] = 5  # the first position's label is predicted by nothing
    pre = apply_pre(model)
    model(**batch).loss.backward()
    plain = pre.heads[2].weight_1.grad.clone()
    model.zero_grad()
    labels = (batch["labels"][:, 1:] != -100).sum()
    assert labels + 2 == (batch["labels"] != -100).sum()
    pre.denominator = 2 * PATCHES if with_denominator else None
    model(**batch, num_items_in_batch=4 * labels).loss.backward()
    share = 1 if with_denominator else 4
    assert relative_error(pre.heads[2].weight_1.grad * share, plain) < 1e-6


def test_frozen_llm_still_trains_the_head_and_the_projector() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model(**batch).loss.backward()
    assert min(p.grad.norm().item() for p in pre.heads[2].parameters()) > 0
    projector = model.model.multi_modal_projector
    with_pre = [p.grad.clone() for p in projector.parameters()]
    remove_pre(model)
    model.zero_grad()
    model(**batch).loss.backward()
    differences = [
        relative_error(g, p.grad) for g, p in zip(with_pre, projector.parameters(), strict=True)
    ]
    assert min(differences) > 1e-3


@pytest.mark.parametrize("level", ("patch", "global"))
def test_everything_frozen_but_the_head(level: str) -> None:
    """Then there is no graph of the model's layers."""
    model, batch = tiny_llava().requires_grad_(False), make_batch()
    pre = apply_pre(model, level=level)
    output = model(**batch)
    assert not output.logits.requires_grad
    output.loss.backward()
    ours = pre.heads[2].weight_0.grad
    assert ours.norm() > 0
    assert all(p.grad is None for n, p in model.named_parameters() if "pre_heads" not in n)


def test_config_is_honoured() -> None:
    pre = apply_pre(
        tiny_llava(), PReConfig(layers=1), head_features=7, depth=3, activation="relu", seed=4
    )
    assert list(pre.heads) == [1]
    shapes = [tuple(w.shape) for w in pre.heads[1].weights]
    assert shapes == [(7, WIDTH), (7, 7), (WIDTH, 7)]
    assert pre.heads[1].activation == "relu"
    again = apply_pre(tiny_llava(), layers=1, head_features=7, depth=3, activation="relu", seed=4)
    assert torch.equal(pre.heads[1].weight_0, again.heads[1].weight_0)


def test_the_global_generator_is_left_alone() -> None:
    model = tiny_llava()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    apply_pre(model)
    assert torch.equal(torch.rand(3), expected)


def test_an_optimizer_step_lowers_the_loss() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        values.append(pre.metrics()["pre_loss"])
    assert values[-1] < values[0] - 0.3


def test_repr() -> None:
    """What is regularised, to what, by how many parameters more; what the model keeps where."""
    pre = apply_pre(tiny_llava(), layers=(1, 3), weight=0.25)
    per_head = WIDTH * WIDTH + WIDTH
    assert repr(pre) == (
        "PRe(layers=[1, 3], weight=0.25, anchor='pre_llm', level='patch', "
        f"head_parameters={4 * per_head:,})\n"
        "  family: LLaVA, listed\n"
        "  layers: model.language_model.layers: 4 LlamaDecoderLayer, by get_decoder()\n"
        "  language_model: model.language_model: it holds the layers and takes inputs_embeds\n"
        f"  visual_tokens: image_token_id = {IMAGE_TOKEN}"
    )
    pre = apply_pre(
        tiny_llava(), layers=(1, 3), share_head=True, anchor=anchor_of_pixels, anchor_features=8
    )
    assert f"'anchor_of_pixels', level='patch', head_parameters={per_head + 8 * 25:,}" in repr(pre)
