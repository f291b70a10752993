# SPDX-License-Identifier: Apache-2.0
"""PRe on every family: the term, its anchor and its layers, and what must stay as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prereg_kernels import apply_pre, remove_pre
from tests.attach.families.batches import SCENES, has, make_batch
from tests.attach.families.models import CASES, LAYERS, make_model
from tests.attach.test_regularizer import traces
from tests.attached import NON_REENTRANT, both, compare, seen
from tests.releases import HERE
from tests.tiny import gradients

FAMILY_SCENES = [(name, scene) for name in CASES for scene in SCENES if has(name, scene)]
every_family = pytest.mark.parametrize("name", CASES)
every_scene = pytest.mark.parametrize("name, scene", FAMILY_SCENES)
checkpointed = pytest.mark.parametrize(
    "checkpointing", (False, True), ids=("plain", "checkpointed")
)


@checkpointed
@every_scene
def test_gradients(name: str, scene: str, checkpointing: bool) -> None:
    batch = make_batch(name, make_model(name), scene)
    ours, expected, metrics, (lm, term) = both(
        batch.inputs, make=lambda: make_model(name), mask=batch.visual, checkpointing=checkpointing
    )
    compare(ours, expected)
    assert metrics["lm_loss"] == pytest.approx(lm, rel=1e-5)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4, abs=1e-7)
    assert metrics["visual_tokens"] == len(batch.features)
    assert (term == 0) == (scene == "text only")


@checkpointed
@pytest.mark.parametrize(
    "name, scene",
    [x for x in FAMILY_SCENES if x[1] in ("uneven images", "text only", "left padding")],
)
def test_gradients_of_several_layers(name: str, scene: str, checkpointing: bool) -> None:
    """With padding there is a row of two images and one without."""
    batch = make_batch(name, make_model(name), scene)
    ours, expected, metrics, (_, term) = both(
        batch.inputs, make=lambda: make_model(name), mask=batch.visual,
        checkpointing=checkpointing, layers=(1, LAYERS - 1),
    )  # fmt: skip
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4, abs=1e-7)
    assert (term == 0) == (scene == "text only")


@every_family
def test_layers_are_numbered_as_hidden_states(name: str) -> None:
    model = make_model(name)
    batch = make_batch(name, model)
    with seen(model) as states:
        hidden_states = model(**batch.inputs, output_hidden_states=True).hidden_states
    assert len(hidden_states) == LAYERS + 1  # the last one is normalised: not a layer's output
    # transformers 4.57 adds to the states that it returns after their layer, or scales what enters
    is_other = HERE < (5, 0) and name in ("qwen3_vl", "paligemma")
    if is_other:
        hidden_states = [states[layer] for layer in range(LAYERS)]
    for layer in range(LAYERS):
        assert torch.equal(states[layer], hidden_states[layer]), layer
    layers = range(1, LAYERS)
    pre = apply_pre(model, layers=tuple(layers))
    given = head_inputs(pre)
    again = model(**batch.inputs, output_hidden_states=True).hidden_states
    hidden_states = hidden_states if is_other else again
    for layer in layers:
        assert torch.equal(given[layer]["hidden"], hidden_states[layer]), layer


@every_scene
def test_the_anchor_is_what_was_merged(name: str, scene: str) -> None:
    """Row by row what the model makes of the pixels, in the order of the visual tokens."""
    model = make_model(name)
    batch = make_batch(name, model, scene)
    given = head_inputs(apply_pre(model, layers=2))[2]
    model(**batch.inputs)
    rows = given["anchor"].flatten(0, -2)[given["visual_index"]]
    assert torch.equal(given["visual_index"], batch.visual.flatten().nonzero().squeeze(1))
    assert torch.equal(rows, batch.features)


def head_inputs(pre: Any) -> dict[int, dict[str, Any]]:
    """{layer: what its head is called with}, once the model runs."""
    given: dict[int, dict[str, Any]] = {}

    def see(layer: int) -> Any:
        def hook(head: nn.Module, args: Any, kwargs: Any) -> None:
            given[layer] |= {"hidden": args[0], "anchor": args[1], **kwargs}

        return hook

    for layer, head in pre.heads.items():
        given[layer] = {}
        head.register_forward_pre_hook(see(layer), with_kwargs=True)
    return given


@checkpointed
@every_family
def test_remove_restores_everything(name: str, checkpointing: bool) -> None:
    model = make_model(name)
    batch = make_batch(name, model)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    plain = model(**batch.inputs)  # transformers leaves hooks of its own on the first call
    before = traces(model)
    apply_pre(model)
    model(**batch.inputs).loss.backward()
    remove_pre(model)
    assert traces(model) == before
    after = model(**batch.inputs)
    assert torch.equal(after.loss, plain.loss) and torch.equal(after.logits, plain.logits)


@every_family
def test_save_pretrained_writes_a_plain_model(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    batch = make_batch(name, model)
    apply_pre(model)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    remove_pre(model)
    ours, theirs = model.eval()(**batch.inputs), loaded.eval()(**batch.inputs)
    assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("value_in_eval", (False, True))
@every_family
def test_generate(name: str, value_in_eval: bool) -> None:
    model = make_model(name).eval()
    inputs = make_batch(name, model, "left padding").inputs
    del inputs["labels"]
    options = {
        "max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    plain = model.generate(**inputs, **options)
    apply_pre(model, value_in_eval=value_in_eval)
    ours = model.generate(**inputs, **options)
    assert ours.sequences.shape[1] == inputs["input_ids"].shape[1] + 4
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(map(torch.equal, ours.logits, plain.logits))


def test_a_zero_anchor_has_finite_gradients() -> None:
    """Gemma 3's projection begins with zeros: the term is 0, and so is its gradient, rounded."""
    model = make_model("gemma3")
    batch = make_batch("gemma3", model)
    nn.init.zeros_(model.model.multi_modal_projector.mm_input_projection_weight)
    pre = apply_pre(model)
    given = head_inputs(pre)[2]
    model(**batch.inputs).loss.backward()
    assert given["anchor"].flatten(0, -2)[given["visual_index"]].count_nonzero() == 0
    assert pre.metrics()["pre_loss"] == 0
    ours = gradients(model)
    assert all(x.isfinite().all() for x in ours.values())
    assert all(p.grad.norm() < 1e-6 for p in pre.heads[2].parameters())
    remove_pre(model)
    model.zero_grad()
    model(**batch.inputs).loss.backward()
    compare({name: ours[name] for name, _ in model.named_parameters()}, gradients(model))
