# SPDX-License-Identifier: Apache-2.0
"""My model makes many rows of one image token, and PRe regularises the wrong positions.

PRe finds the visual tokens in `input_ids`. Where the decoder's sequence has another shape, a
position there means nothing: an error that names both shapes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre
from tests.tiny import make_batch, tiny_llava


@pytest.mark.parametrize("change", ("expanded", "cut"))
@pytest.mark.parametrize("settings", ({}, {"level": "global"}, {"value_in_eval": True}))
def test_both_shapes_are_named(settings: dict[str, Any], change: str) -> None:
    model, batch = tiny_llava(), make_batch()
    apply_pre(model, **settings)
    language_model = model.model.language_model

    def other(module: Any, args: Any, kwargs: Any) -> Any:
        states = kwargs["inputs_embeds"]
        states = torch.cat([states, states], 1) if change == "expanded" else states[:, :7]
        ignored = {"attention_mask": None, "position_ids": None}
        return args, kwargs | ignored | {"inputs_embeds": states}

    language_model.register_forward_pre_hook(other, with_kwargs=True, prepend=True)
    length = 28 if change == "expanded" else 7
    del batch["labels"]
    if "value_in_eval" in settings:
        model.eval()
    with pytest.raises(ValueError, match=rf"input_ids: .*\(2, 14\), got .*\(2, {length}\)"):
        model(**batch)
