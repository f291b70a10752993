# SPDX-License-Identifier: Apache-2.0
"""What a case of the zoo gives: a tiny model and batches for it; and the list of the cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from tests.releases import is_here


class Batch(NamedTuple):
    """A batch.

    Attributes:
        inputs: keyword arguments of the model's forward, labels included.
        visual: bool, (rows, length): the positions where the model puts visual features, of images
            and of videos. Nowhere, if it puts none in place of tokens.
    """

    inputs: dict[str, Any]
    visual: Tensor


@dataclass
class Sample:
    """A case.

    Attributes:
        model: with random weights, float32, in training mode.
        batches: by scene: "images", "videos", "mixed" and "text only", as far as the type has them.
            "mixed" has an audio clip beside an image and a video, where the type listens.
    """

    model: Any
    batches: dict[str, Batch]


CASES: dict[str, Callable[[], Sample]] = {}
BUILDERS: dict[str, Callable[[], Sample]] = {}  # those too that this release of transformers lacks


def case(name: str) -> Callable[[Callable[[], Sample]], Callable[[], Sample]]:
    """Lists a builder by its model_type, or by 'model_type+variant', where the release has it."""

    def add(build: Callable[[], Sample]) -> Callable[[], Sample]:
        assert name not in BUILDERS, name
        BUILDERS[name] = build
        if is_here(name):
            CASES[name] = build
        return build

    return add
