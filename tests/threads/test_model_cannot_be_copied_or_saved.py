# SPDX-License-Identifier: Apache-2.0
"""torch.save(model) fails with PRe attached, and a deep copy keeps the original's memory alive.

What PRe keeps on a model is plain objects, so it is copied and pickled with it; what belongs to a
call that runs is left behind.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre, find_pre, remove_pre
from prereg_kernels.attach.handle import state_of
from tests.attached import anchor_of_pixels
from tests.tiny import gradients, make_batch, tiny_llava

SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "two layers": {"layers": (1, 3), "share_head": True, "value_in_eval": True},
    "function": {"anchor": anchor_of_pixels, "anchor_features": 8, "token_fraction": 0.5},
    "encoder": {"anchor": "pre_projector", "level": "global"},
}


def train(model: Any) -> dict[str, torch.Tensor]:
    model(**make_batch((1, 2))).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_saved_model_trains_on(settings: dict[str, Any]) -> None:
    model, file = tiny_llava(), io.BytesIO()
    apply_pre(model, **settings)
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    ours, expected = train(loaded), train(model)
    assert all(torch.equal(ours[name], x) for name, x in expected.items())
    assert find_pre(loaded).metrics() == find_pre(model).metrics()
    assert state_of(find_pre(loaded)).model is loaded
    remove_pre(loaded)
    assert "forward" not in vars(loaded) and not hasattr(loaded, "pre_heads")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_copy_lets_go_of_the_original(settings: dict[str, Any]) -> None:
    model = tiny_llava()
    apply_pre(model, **settings)
    train(model)
    model.zero_grad()
    clone = copy.deepcopy(model)
    weight = weakref.ref(model.model.language_model.layers[0].self_attn.q_proj.weight)
    # transformers' own hooks of a first call hold their model, in a copy, too
    plain = tiny_llava()
    plain(**make_batch())
    plain_clone, plain_weight = copy.deepcopy(plain), weakref.ref(plain.lm_head.weight)
    del model, plain
    gc.collect()
    assert (weight() is None) == (plain_weight() is None)
    assert train(clone)["pre_heads." + next(iter(clone.pre_heads)) + ".weight_0"].norm() > 0
    del plain_clone


def test_a_copy_on_another_device_leaves_the_originals_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The buffers that graphs write into; `meta` stands for the other device."""
    model = tiny_llava()
    apply_pre(model)
    clone = copy.deepcopy(model)
    ours, theirs = (hooks_of(x) for x in (model, clone))
    theirs._values_in_graph(torch.device("meta"))
    assert ours._compiled_values[2].device.type == "cpu"
    assert theirs._compiled_values[2].device.type == "meta"


def hooks_of(model: Any) -> Any:
    return vars(model)["forward"]._hooks
