# SPDX-License-Identifier: Apache-2.0
"""Nothing is left out that this release of transformers has: each line of `releases.py` is true."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_TYPES,
)

from prereg_kernels._util import supported
from tests.releases import BROKEN, HERE, LATER, SINCE, TESTED, is_here
from tests.zoo.parts import UNLISTED
from tests.zoo.refused import NAMES
from tests.zoo.sample import BUILDERS, CASES


def test_the_release_is_one_of_those_listed() -> None:
    assert transformers.__version__ in supported.TESTED


@pytest.mark.parametrize("name", sorted({t for n in {*BUILDERS, *NAMES} for t in n.split("+")}))
def test_a_type_is_left_out_where_it_is_not_there(name: str) -> None:
    """Of 'model_type+part' either; parts that are no types, as 't5', are in all releases."""
    is_type = name in CONFIG_MAPPING_NAMES or name in UNLISTED
    assert is_type == (SINCE.get(name, HERE) <= HERE) or name in ("opt", "llama", "siglip", "t5")


def test_every_line_is_of_a_case_and_a_tested_release() -> None:
    parts = {part for name in {*BUILDERS, *NAMES} for part in name.split("+")}
    assert SINCE.keys() <= parts and BROKEN.keys() <= BUILDERS.keys()
    assert set(SINCE.values()) <= set(TESTED[1:])
    assert set().union(*BROKEN.values()) <= set(TESTED)
    assert not LATER & parts
    assert IMAGE_TEXT_TYPES.keys() >= LATER or TESTED[-1] > HERE
    assert CASES.keys() == {name for name in BUILDERS if is_here(name)}


def test_what_is_broken_is() -> None:
    for name in BROKEN.keys() - CASES.keys():
        sample = BUILDERS[name]()
        inputs = sample.batches["images"].inputs
        if name == "emu3":
            other = {**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])}
            with torch.no_grad():
                assert sample.model(**inputs).loss == sample.model(**other).loss
        elif name == "llama4":
            with pytest.raises(AttributeError, match="has no attribute 'image_outputs'"):
                sample.model(**inputs)
        else:
            with pytest.raises(RuntimeError, match="shape mismatch: value tensor"):
                sample.model(**sample.batches["mixed"].inputs)
