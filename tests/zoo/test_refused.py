# SPDX-License-Identifier: Apache-2.0
"""The types, all of them: with samples, or refused and told why."""

from __future__ import annotations

import pytest
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_TYPES,
)

from tests.releases import BROKEN, FORMER, HERE, LATER, is_here
from tests.zoo import CASES
from tests.zoo.parts import UNLISTED
from tests.zoo.refused import REFUSED

# They see images too.
MORE_TYPES = {"phi4_multimodal", "qwen2_5_omni", "qwen3_omni_moe"}
if HERE < (5, 0):  # which lists fewer
    MORE_TYPES |= {"instructblipvideo", "video_llava", *UNLISTED}


def test_every_type_is_here_once() -> None:
    served = {name for name in CASES if "+" not in name}
    assert served & REFUSED.keys() == set()
    types = set(IMAGE_TEXT_TYPES) | MORE_TYPES
    assert served | REFUSED.keys() | {n for n in BROKEN if not is_here(n)} == types - LATER - FORMER


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model_is_of_its_type(name: str) -> None:
    model = REFUSED[name]()
    assert model.config.model_type == name
    if name in IMAGE_TEXT_TYPES:
        assert type(model).__name__ == IMAGE_TEXT_TYPES[name]
