# SPDX-License-Identifier: Apache-2.0
"""I train Qwen3-VL in ms-swift with a head at a layer of deepstack: "a view ... modified inplace".

ms-swift adds the features of deepstack to a layer's output in place, as transformers did before 5.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre
from tests.attach.families.batches import make_batch
from tests.attach.families.models import make_model
from tests.attached import NON_REENTRANT
from tests.tiny import gradients


def in_place(self: Any, hidden: Tensor, where: Tensor, features: Tensor) -> Tensor:
    hidden[where, :] = hidden[where, :].clone() + features
    return hidden


@pytest.mark.parametrize("checkpointing", (None, NON_REENTRANT, {"use_reentrant": True}))
@pytest.mark.parametrize("layer", (1, 2))
def test_the_gradients_are_those_of_a_copy(layer: int, checkpointing: Any) -> None:
    found: list[dict[str, Tensor]] = []
    for is_in_place in (False, True):
        model = make_model("qwen3_vl")
        inputs = make_batch("qwen3_vl", model).inputs
        if is_in_place:
            language = model.model.language_model
            language._deepstack_process = MethodType(in_place, language)
        apply_pre(model, layers=(layer,), weight=3.0)
        if checkpointing is not None:
            model.model.visual.requires_grad_(False)
            model.gradient_checkpointing_enable(checkpointing)
        model(**inputs).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert any("pre_heads" in name for name in found[0])
    for name, x in found[0].items():
        torch.testing.assert_close(found[1][name], x)
