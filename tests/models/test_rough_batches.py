# SPDX-License-Identifier: Apache-2.0
"""Batches that no processor makes, models that nobody has listed: right, or told of."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre
from prereg_kernels.attach import first_steps, resolver
from tests.attached import both, compare, eager_term
from tests.models.places import place_of
from tests.models.test_gradients import NEEDS_IMAGES, richest
from tests.models.test_perturbed import each_kind
from tests.releases import HERE, here, needs
from tests.zoo import sample

ANSWERS = (
    "features and are not counted",
    "family.streams",
    "are zero, and so",
    "no id of a visual",
)


def check(name: str, inputs: dict[str, Any], mask: Tensor, **settings: Any) -> None:
    make = settings.pop("make", lambda: sample(name).model)
    ours, expected, metrics, (_, term) = both(
        inputs, make=make, mask=mask, place=place_of(name), **settings
    )
    compare(ours, expected)
    assert metrics["visual_tokens"] == mask.sum()
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4) and term != 0


@each_kind
def test_a_type_that_nobody_listed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is found as the table has it, or there is a word."""
    for scene, batch in sample(name).batches.items():
        figures = []
        for is_listed in (True, False):
            with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if not is_listed:
                    for module in (resolver, first_steps):
                        patch.setattr(module, "family_of_type", lambda model_type: None)
                try:
                    model = sample(name).model
                    pre = apply_pre(model)
                    model(**batch.inputs).loss.backward()
                    figures.append(pre.metrics())
                except ValueError as error:
                    figures.append(str(error))
                words = [str(w.message) for w in caught if str(w.message).startswith("PRe: ")]
        listed, found = figures
        assert "pre_loss" in listed
        if found != listed or words:
            assert any(answer in f"{found} {words}" for answer in ANSWERS), (scene, found, words)


@pytest.mark.parametrize("name", here("llava", "qwen3_vl", "phi4_multimodal", "granite4_vision"))
def test_images_that_attention_hides(name: str) -> None:
    """Those of the last row are padding."""
    batch = sample(name).batches["images"]
    attention = batch.inputs["attention_mask"].clone()
    attention[1][batch.visual[1]] = 0
    visual = batch.visual & (attention == 1)
    assert 0 < visual.sum() < batch.visual.sum()
    check(name, batch.inputs | {"attention_mask": attention}, visual)


@pytest.mark.parametrize("name", ("llava", "glm4v", "gemma3", "blip-2", "phi4_multimodal"))
def test_padding_on_the_left(name: str) -> None:
    batch = sample(name).batches["images"]
    shown = batch.inputs["attention_mask"] == 1
    order = shown.long().argsort(dim=1, stable=True)
    inputs = {
        k: x.gather(1, order) if isinstance(x, Tensor) and x.shape == shown.shape else x
        for k, x in batch.inputs.items()
    }
    assert not inputs["attention_mask"][:, 0].all()
    check(name, inputs, batch.visual.gather(1, order))


def without_pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    kept = ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "token_type_ids")
    return {k: x for k, x in inputs.items() if k in kept}


@each_kind
def test_placeholders_without_pixels(name: str) -> None:
    if name in NEEDS_IMAGES or name == "kosmos-2.5":  # the model itself refuses
        return
    case = sample(name)
    apply_pre(case.model)
    inputs = without_pixels(case.batches[richest(name)].inputs)
    # The rows of the one go through a norm, of the other are in the tower's table
    if name == "gemma3n" or (name == "inkling_mm_model" and HERE < (5, 24)):
        with pytest.warns(UserWarning, match=r"visual rows .* are the same, and the batch has no"):
            case.model(**inputs)
        return
    with pytest.raises(ValueError, match="Either the batch lacks their images, or these are not"):
        case.model(**inputs)


@pytest.mark.parametrize("name", here("llava", "chameleon", "granite4_vision", "inkling_mm_model"))
def test_embeddings_of_the_callers(name: str) -> None:
    """Without ids: an error, or where a mask says where visual tokens are, their rows."""
    case = sample(name)
    batch = case.batches["images"]
    rows = case.model.get_input_embeddings()(batch.inputs["input_ids"]).detach()
    rows[batch.visual] = torch.randn(
        int(batch.visual.sum()), rows.shape[-1], generator=torch.Generator().manual_seed(0)
    )
    inputs = without_pixels(batch.inputs) | {"inputs_embeds": rows}
    del inputs["input_ids"]
    pre = apply_pre(case.model)
    with pytest.raises(ValueError, match=r"input_ids: .* or a mask in pre\.next_visual_mask"):
        case.model(**inputs)
    pre.next_visual_mask = batch.visual
    case.model(**inputs).loss.backward()
    _, term = eager_term(
        sample(name).model, inputs, pre.heads, batch.visual, place=place_of(name)
    )  # fmt: skip
    assert pre.metrics()["pre_loss"] == pytest.approx(term.item(), rel=1e-4) and term != 0


def later_granite() -> Any:
    """Its features go to the second to fifth layer, so the first one's input has none."""
    case = sample("granite4_vision")
    config = copy.deepcopy(case.model.config)
    config.deepstack_layer_map = [[v, layer + 1] for v, layer in config.deepstack_layer_map]
    config.spatial_target_layers = [layer + 1 for layer in config.spatial_target_layers]
    model = type(case.model)(config).train()
    model.load_state_dict(case.model.state_dict())
    return model


@needs("granite4_vision")
def test_granite_whose_features_are_added_later() -> None:
    batch = sample("granite4_vision").batches["images"]

    def entry(model: Any, inputs: Any) -> Tensor:
        seen: list[Tensor] = []
        layer = model.model.language_model.layers[1]
        hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        return seen[0][batch.visual]

    check(
        "granite4_vision", batch.inputs, batch.visual, make=later_granite, anchor_rows=entry,
        layers=(2, 3),
    )  # fmt: skip
    with pytest.raises(ValueError, match="layers: expected layers after number 1"):
        apply_pre(later_granite(), layers=1)


@needs("granite4_vision")
@pytest.mark.parametrize("tokens, error", (((42,), True), ((40, 42), True), ((49,), False)))
def test_wrong_ids_where_features_are_added_later(tokens: tuple[int, ...], error: bool) -> None:
    """Where they will be, the rows are zero."""
    batch, model = sample("granite4_vision").batches["images"], later_granite()
    family = resolver.resolve(model).family
    apply_pre(model, family=type(family)(**vars(family) | {"visual_tokens": tokens}))
    if error:
        with pytest.raises(ValueError, match=r"6 enter 'model.language_model' as plain rows"):
            model(**batch.inputs)
    else:
        with pytest.warns(UserWarning, match=r"44 positions .*: 40 ") as caught:
            model(**batch.inputs)
        assert sum("positions of the batch" in str(w.message) for w in caught) == 1
