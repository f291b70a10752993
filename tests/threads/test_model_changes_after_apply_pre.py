# SPDX-License-Identifier: Apache-2.0
"""I changed the image token, the forward or the device after apply_pre, and PRe did not follow.

What the model reads anew in each call, PRe reads anew.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre
from tests.tiny import IMAGE_TOKEN, PATCHES, gradients, make_batch, tiny_llava

OTHER = 37


def train(model: Any, *args: Any, **batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*args, **batch).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("level", ("patch", "global"))
def test_the_image_token(level: str) -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(model, level=level)
    expected = train(model, **batch)
    ids = batch["input_ids"]
    batch["input_ids"] = ids.masked_fill(ids == IMAGE_TOKEN, OTHER)
    model.config.image_token_id = OTHER
    ours = train(model, **batch)
    assert all(torch.equal(ours[name], x) for name, x in expected.items())
    assert pre.visual_mask(batch["input_ids"]).sum() == 3 * PATCHES


def test_an_image_token_that_is_gone() -> None:
    model, batch = tiny_llava(), make_batch()
    apply_pre(model)
    model.config.image_token_id = None
    with pytest.raises(ValueError, match="visual_tokens: expected the id of a token"):
        model(**batch)


def test_the_order_of_the_arguments_of_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a patch for another loss may have it, on the class."""
    model, batch = tiny_llava(), make_batch((1, 2))
    apply_pre(model)
    expected = train(model, **batch)
    original = type(model).forward

    def forward(self: Any, labels: Any, input_ids: Any, **kwargs: Any) -> Any:
        return original(self, input_ids=input_ids, labels=labels, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    labels, ids = batch.pop("labels"), batch.pop("input_ids")
    ours = train(model, labels, ids, **batch)
    assert all(torch.equal(ours[name], x) for name, x in expected.items())


def test_the_dtype() -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(model)
    expected = train(model, **batch)
    model.double()
    batch["pixel_values"] = batch["pixel_values"].double()
    ours = train(model, **batch)
    assert pre.heads[2].weight_0.dtype == torch.float64
    torch.testing.assert_close(
        ours["pre_heads.2.weight_0"].float(), expected["pre_heads.2.weight_0"]
    )


def test_the_decoder_layer() -> None:
    """Another one in its place has no hook: an error, not a step without the term."""
    model, batch = tiny_llava(), make_batch()
    apply_pre(model)
    layers = model.model.language_model.layers
    layers[1] = layers[0]
    with pytest.raises(RuntimeError, match=r"expected the layers \[2\] to run, got \[\]"):
        model(**batch)
