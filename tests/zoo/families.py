# SPDX-License-Identifier: Apache-2.0
"""The families that the package lists, as their own tests make them."""

from __future__ import annotations

from functools import partial

from tests.attach.families.batches import lay_out
from tests.attach.families.models import CASES as FAMILIES
from tests.attach.families.models import make_model
from tests.zoo.sample import Batch, Sample, case


def family(name: str) -> Sample:
    model, described = make_model(name), FAMILIES[name]
    scenes = {"text only": ("", ""), "images": ("ab" if "b" in described.sizes else "aa", "a")}
    if described.video:
        scenes |= {"videos": ("v", "v"), "mixed": ("av", "a")}
    batches = {}
    for scene, rows in scenes.items():
        laid_out = lay_out(name, model, rows)
        batches[scene] = Batch(laid_out.inputs, laid_out.visual)
    return Sample(model, batches)


for _name in FAMILIES:
    case(_name)(partial(family, _name))
