# SPDX-License-Identifier: Apache-2.0
"""Types that PRe cannot regularise: an error at `apply_pre` that says why, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest

from prereg_kernels import apply_pre
from tests.attach.test_regularizer import traces
from tests.models.places import UNMERGED, place_of
from tests.releases import here
from tests.zoo import sample
from tests.zoo.refused import NAMES, REFUSED

REASONS = {
    "blip": "reads images by cross-attention",
    "diffusion_gemma": "its forward has no loss",
    "evolla": "reads proteins",
    "git": "puts an image's rows beside the text",
    "idefics": "reads images by cross-attention",
    "mistral4": "reads text alone",
    "mllama": "reads images by cross-attention",
    "pi0": "it learns actions",
    "pix2struct": "reads images by cross-attention",
    "pp_formulanet": "reads images by cross-attention",
    "qwen2_5_omni": r"call apply_pre\(model\.thinker\)",
    "qwen3_omni_moe": r"call apply_pre\(model\.thinker\)",
    "udop": "puts an image's rows beside the text",
    "vision-encoder-decoder": "reads images by cross-attention",
}


def model_of(name: str) -> Any:
    return sample(name).model if name in UNMERGED else REFUSED[name]()


def test_every_refused_type_has_a_reason() -> None:
    assert REASONS.keys() == {*UNMERGED, *NAMES}


@pytest.mark.parametrize("name", here(*REASONS))
def test_a_refused_type(name: str) -> None:
    model = model_of(name)
    before = traces(model)
    with pytest.raises(
        ValueError, match=f"{type(model).__name__} is not supported: .*{REASONS[name]}"
    ):
        apply_pre(model)
    assert traces(model) == before


@pytest.mark.parametrize("name", ("qwen2_5_omni", "qwen3_omni_moe"))
def test_the_thinker_of_a_shell(name: str) -> None:
    pre = apply_pre(REFUSED[name]().thinker)
    assert pre.family.language_model == place_of(f"{name}_thinker").language_model
